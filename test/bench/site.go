// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// port is where the servers listen.
const port = 8080

// site is a path that is laid out: two nodes, pods on both, and what carries
// their connections. The first pods of both nodes are the pair that is measured.
type site struct {
	name string
	path path
	lab  *lab.Lab
	ca   *testca.CA // of those who have no authority of their own

	client, server *lab.Pod
	proxies        []proxy
	daemons        []*lab.Daemon // of Culvert
	wire           string        // what protects the connections, as seen between the nodes

	workloads []lab.Workload // what Culvert is told; nil: all pods
	self      string
	closers   []io.Closer
}

// proxy is a process that carries connections.
type proxy struct {
	node *lab.Node
	pid  int
}

// layOut builds a site with some pods on each node, the proxies aside.
func layOut(ctx context.Context, p namedPath, pods int) (*site, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	l, err := lab.New(ctx, lab.Config{Nodes: 2, PodsPerNode: pods, Prefix: prefix, OwnCgroup: true})
	if err != nil {
		return nil, err
	}
	s := &site{name: p.name, path: p.path, lab: l, self: self, client: l.Pod(1, 1), server: l.Pod(2, 1)}
	if s.ca, err = testca.New(lab.TrustDomain); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// openSite lays out a pair and has it carried.
func openSite(ctx context.Context, p namedPath) (s *site, err error) {
	if s, err = layOut(ctx, p, 1); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", p.name, err), s.close())
		}
	}()
	for _, n := range s.lab.Nodes {
		if err := s.path.carry(ctx, s, n, n.Pods); err != nil {
			return s, err
		}
	}
	if err := s.serve(s.server); err != nil {
		return s, err
	}
	return s, s.prove(ctx)
}

func (s *site) close() error {
	for _, c := range s.closers {
		c.Close()
	}
	return s.lab.Close()
}

// serve starts the server's process in a pod and waits for its word.
func (s *site) serve(p *lab.Pod) error {
	cmd := exec.Command(s.self, "serve")
	cmd.Stderr = os.Stderr
	_, in, out, err := s.start(p, cmd)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, in)
	defer out.Close()
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		return fmt.Errorf("start server in %s: %w", p.Name, err)
	}
	return nil
}

// start starts a process in a pod, with pipes to its input and from its output.
func (s *site) start(p *lab.Pod, cmd *exec.Cmd) (proc *lab.Process, in, out *os.File, err error) {
	inR, in, err := os.Pipe()
	if err != nil {
		return nil, nil, nil, err
	}
	defer inR.Close() // the child has its own
	out, outW, err := os.Pipe()
	if err != nil {
		in.Close()
		return nil, nil, nil, err
	}
	defer outW.Close()
	cmd.Stdin, cmd.Stdout = inR, outW
	if proc, err = p.Start(cmd); err != nil {
		in.Close()
		out.Close()
		return nil, nil, nil, err
	}
	return proc, in, out, nil
}

// open starts a program in a pod; what it says goes to a file beside the node's.
func (s *site) open(p *lab.Pod, cmd *exec.Cmd) (*lab.Process, error) {
	return s.openAs(p.Node, p.Name, p.Start, cmd)
}

func (s *site) openAs(n *lab.Node, name string, start func(*exec.Cmd) (*lab.Process, error), cmd *exec.Cmd) (*lab.Process, error) {
	f, err := os.OpenFile(logFile(n, name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close() // the child has its own
	cmd.Stdout, cmd.Stderr = f, f
	return start(cmd)
}

func logFile(n *lab.Node, name string) string { return filepath.Join(n.Dir, name+".log") }

// tail is the end of what a program has said.
func tail(n *lab.Node, name string) string { return lab.Tail(logFile(n, name), 10) }

// marker is what the first request carries: an eye between the nodes looks for it.
const marker = "culvert-bench: this is to be seen in plaintext on the direct path only"

// prove waits until the path carries, and looks between the nodes at what that
// makes of the marker, and at the handshake.
func (s *site) prove(ctx context.Context) (err error) {
	pcap := filepath.Join(s.lab.Dir, "proof.pcap")
	c, err := capture.Start(capture.Config{
		NS: s.lab.Nodes[0].NS, Interface: s.lab.Nodes[0].Uplink(s.lab.Nodes[1]), Markers: []string{marker}, Pcap: pcap,
	})
	if err != nil {
		return err
	}
	const patience = 20 * time.Second
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = lab.Until(wait, s.name+" carries a request", func() error {
		_, err := s.do(wait, load{Mode: modeEcho, Conns: 1, Size: len(marker), Message: marker, For: time.Millisecond})
		return err
	})
	c.Sync()
	seen := c.Seen(0)
	if err = errors.Join(err, c.Close()); err != nil {
		return fmt.Errorf("%w\n%s\n%s", err, tail(s.client.Node, s.client.Name), tail(s.server.Node, s.server.Name))
	}
	frames, err := os.ReadFile(pcap)
	if err != nil {
		return err
	}
	hello, secured := findHello(frames)
	switch plain := seen > 0; {
	case len(s.proxies) == 0:
		s.wire = "plaintext"
		if !plain || secured {
			return fmt.Errorf("a direct request is not seen in plaintext between the nodes: what looks there is blind")
		}
	case plain || !secured:
		return fmt.Errorf("the request was seen %d times in plaintext between the nodes, a TLS 1.3 handshake: %v", seen, secured)
	default:
		s.wire = hello.String()
	}
	return nil
}

// running is a load that was started.
type running struct {
	name     string
	proc     *lab.Process
	in, out  *os.File
	says     *bufio.Reader
	complain *bytes.Buffer // complete once the process has ended
}

// begin starts a load in the client's pod, which ends with the context at the
// latest: on a path that stands still it would wait for ever.
func (s *site) begin(ctx context.Context, l load) (*running, error) {
	return s.beginIn(ctx, s.client, l)
}

func (s *site) beginIn(ctx context.Context, p *lab.Pod, l load) (*running, error) {
	spec, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	to := netip.AddrPortFrom(s.server.V4, port)
	cmd, complain := exec.CommandContext(ctx, s.self, "load", "-addr", to.String(), "-spec", string(spec)), new(bytes.Buffer)
	cmd.Stderr = complain
	proc, in, out, err := s.start(p, cmd)
	if err != nil {
		return nil, err
	}
	return &running{s.name, proc, in, out, bufio.NewReader(out), complain}, nil
}

// do is a load from begin to end.
func (s *site) do(ctx context.Context, l load) (result, error) { return s.doIn(ctx, s.client, l) }

func (s *site) doIn(ctx context.Context, p *lab.Pod, l load) (result, error) {
	r, err := s.beginIn(ctx, p, l)
	if err != nil {
		return result{}, err
	}
	return r.wait(ctx)
}

func (r *running) close() {
	r.in.Close()
	r.out.Close()
}

// wait waits for the result. The context is the one that it was begun with.
func (r *running) wait(ctx context.Context) (result, error) {
	defer r.close()
	var res result
	if err := json.NewDecoder(r.says).Decode(&res); err != nil {
		return res, r.failed(ctx, err)
	}
	return res, nil
}

// failed says why a load gave no result.
func (r *running) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", r.name, context.Cause(ctx))
	}
	const patience = 5 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if end := r.proc.Wait(ctx); end != nil && ctx.Err() == nil {
		return fmt.Errorf("%s: %w: %s", r.name, end, bytes.TrimSpace(r.complain.Bytes()))
	}
	return fmt.Errorf("%s: the load gave no result: %w", r.name, err)
}
