// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/telemetry"
)

// port is where the servers listen.
const port = 8080

// path is one way between two pods.
type path struct {
	name   string
	client *lab.Pod
	server *lab.Pod
}

type bench struct {
	lab     *lab.Lab
	self    string
	direct  path
	culvert path
	daemons []*lab.Daemon
	stdins  []io.Closer
	each    time.Duration

	keepProfile string
}

// newBench lays out two nodes. The first pod of each is enrolled, the second
// is not: its traffic is what it would be without us.
func newBench(ctx context.Context, ztunnel string) (*bench, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	l, err := lab.New(ctx, lab.Config{Nodes: 2, PodsPerNode: 2, Prefix: prefix})
	if err != nil {
		return nil, err
	}
	b := &bench{lab: l, self: self}
	b.culvert = path{"culvert", l.Pod(1, 1), l.Pod(2, 1)}
	b.direct = path{"direct", l.Pod(1, 2), l.Pod(2, 2)}
	known := []lab.Workload{l.Pod(1, 1).Workload(), l.Pod(2, 1).Workload()}
	for i, n := range l.Nodes {
		d, err := n.StartDaemon(ctx, lab.DaemonConfig{Binary: ztunnel, Workloads: known, Pods: []*lab.Pod{l.Pod(i+1, 1)}})
		if err != nil {
			b.close()
			return nil, err
		}
		b.daemons = append(b.daemons, d)
	}
	for _, p := range []path{b.direct, b.culvert} {
		if err := b.serve(p.server); err != nil {
			b.close()
			return nil, err
		}
	}
	return b, nil
}

func (b *bench) close() {
	for _, c := range b.stdins {
		c.Close()
	}
	if err := b.lab.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "bench: clean up:", err)
	}
}

// serve starts the server's process in a pod and waits for its word.
func (b *bench) serve(p *lab.Pod) error {
	cmd := exec.Command(b.self, "serve")
	cmd.Stderr = os.Stderr
	_, out, err := b.start(p, cmd)
	if err != nil {
		return err
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		return fmt.Errorf("start server in %s: %w", p.Name, err)
	}
	return nil
}

func (b *bench) start(p *lab.Pod, cmd *exec.Cmd) (io.WriteCloser, io.Reader, error) {
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	cmd.Stdin, cmd.Stdout = inR, outW
	_, err = p.Start(cmd)
	inR.Close()
	outW.Close()
	if err != nil {
		return nil, nil, err
	}
	b.stdins = append(b.stdins, inW)
	return inW, outR, nil
}

// begin starts a load; the function it returns waits for the result.
func (b *bench) begin(p path, l load) (func() (result, error), io.WriteCloser, *bufio.Reader, error) {
	spec, err := json.Marshal(l)
	if err != nil {
		return nil, nil, nil, err
	}
	to := netip.AddrPortFrom(p.server.V4, port)
	cmd := exec.Command(b.self, "load", "-addr", to.String(), "-spec", string(spec))
	cmd.Stderr = os.Stderr
	in, out, err := b.start(p.client, cmd)
	if err != nil {
		return nil, nil, nil, err
	}
	r := bufio.NewReader(out)
	return func() (result, error) {
		var res result
		if err := json.NewDecoder(r).Decode(&res); err != nil {
			return res, fmt.Errorf("%s: the load gave no result: %w", p.name, err)
		}
		return res, nil
	}, in, r, nil
}

// sample is one measurement.
type sample struct {
	result
	cpu time.Duration // of the daemons
}

func (b *bench) measure(p path, l load) (sample, error) {
	before, err := b.cpu()
	if err != nil {
		return sample{}, err
	}
	wait, in, _, err := b.begin(p, l)
	if err != nil {
		return sample{}, err
	}
	defer in.Close()
	r, err := wait()
	if err != nil {
		return sample{}, err
	}
	after, err := b.cpu()
	return sample{result: r, cpu: after - before}, err
}

// cpu is what the daemons have used so far, user and system.
func (b *bench) cpu() (time.Duration, error) {
	var ns time.Duration
	for _, d := range b.daemons {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", d.PID()))
		if err != nil {
			return 0, err
		}
		for _, t := range tasks {
			data, err := os.ReadFile(t)
			if err != nil {
				continue // the thread has ended
			}
			n, err := strconv.ParseInt(strings.Fields(string(data))[0], 10, 64)
			if err != nil {
				return 0, err
			}
			ns += time.Duration(n)
		}
	}
	return ns, nil
}

// rss is the daemons' resident memory in bytes.
func (b *bench) rss() (int64, error) {
	var sum int64
	for _, d := range b.daemons {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", d.PID()))
		if err != nil {
			return 0, err
		}
		n, err := strconv.ParseInt(strings.Fields(string(data))[1], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n * int64(os.Getpagesize())
	}
	return sum, nil
}

// progress says on a terminal what is being measured.
func (b *bench) progress(format string, args ...any) {
	if telemetry.IsTerminal(os.Stderr) {
		fmt.Fprintf(os.Stderr, "\r\033[K"+format, args...)
	}
}

func median[T int | int64 | float64 | time.Duration](v []T) T {
	if len(v) == 0 {
		return 0
	}
	s := slices.Clone(v)
	slices.Sort(s)
	return s[len(s)/2]
}
