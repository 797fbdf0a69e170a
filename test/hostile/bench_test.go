// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

const hbonePort = 15008

// bench is the mesh that is attacked: the daemon of the second node.
type bench struct {
	*lab.Lab
	t      *testing.T
	ctx    context.Context
	daemon *lab.Daemon
	order  order
	good   [2]string // certificate and key
	bad    [2]string
	pairs  []net.Conn // another pair of pods
	plain  []net.Conn // a pair without the mesh: what the machine takes
}

func newBench(t *testing.T, length time.Duration) *bench {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute+time.Duration(len(kinds))*(2*length+30*time.Second))
	t.Cleanup(cancel)
	l, err := lab.New(ctx, lab.Config{Nodes: 2, PodsPerNode: 4, Prefix: prefix})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close lab: %v", err)
		}
	})
	b := &bench{Lab: l, t: t, ctx: ctx}
	var workloads []lab.Workload
	for _, n := range l.Nodes {
		for _, p := range n.Pods[:2] {
			workloads = append(workloads, p.Workload())
		}
	}
	attacker := l.Pod(1, 3).Workload() // which is a server of the mesh, too
	many, err := newAddresses(block.String())
	b.must(err)
	attacker.Addresses = append(attacker.Addresses, many.all...)
	workloads = append(workloads, attacker)
	b.must(give(l.Pod(1, 3), l.Nodes[1]))
	for _, n := range l.Nodes {
		d, err := n.StartDaemon(ctx, lab.DaemonConfig{Binary: ztunnel, Pods: n.Pods[:2], Workloads: workloads, Settings: map[string]any{
			"tunnel":    map[string]any{"memory": memory, "handshakeTimeout": "1s"},
			"accessLog": map[string]any{"format": "json"},
		}})
		b.must(err)
		b.must(nice(d.PID(), elsewhere))
		b.daemon = d
	}
	b.must(nice(b.daemon.PID(), attacked))
	b.must(nice(os.Getpid(), elsewhere))
	b.certificates()

	target := b.Pod(2, 1)
	at := func(port uint16) string { return netip.AddrPortFrom(target.Addr(4), port).String() }
	b.order = order{Listen: ":" + strconv.Itoa(hbonePort), Target: at(hbonePort), App: at(8080), Deaf: at(8081), Loud: at(8082), Closed: at(9)}
	// The tunnel's own sockets are to hold little of what an application takes
	// nothing of: their buffers would grow to a stream's whole first window, so that
	// at times nothing would be queued.
	b.must(target.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/tcp_wmem", []byte("4096 16384 16384"), 0)
	}))
	apps, err := b.start(target, b.order.as("applications"), os.Stderr)
	b.must(err)
	for _, address := range []string{b.order.App, b.order.Deaf, b.order.Loud} {
		b.must(lab.Until(ctx, "the applications listen", func() error {
			c, err := target.Dial(ctx, netip.MustParseAddrPort(address))
			if err == nil {
				c.Close()
			}
			return err
		}, apps.Ended))
	}

	other, err := b.Pod(2, 2).Echo(8080)
	b.must(err)
	for range 4 {
		c, err := b.Pod(1, 1).Dial(ctx, other.Addr(4))
		b.must(err)
		t.Cleanup(func() { c.Close() })
		b.pairs = append(b.pairs, c)
	}
	plain, err := b.Pod(2, 4).Echo(8080)
	b.must(err)
	for range 2 {
		c, err := b.Pod(1, 4).Dial(ctx, plain.Addr(4))
		b.must(err)
		t.Cleanup(func() { c.Close() })
		b.plain = append(b.plain, c)
	}
	return b
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// certificates writes those of the attacker's: one of the mesh, one that is not.
func (b *bench) certificates() {
	b.t.Helper()
	ca, err := testca.Below(b.RootDir(), lab.TrustDomain)
	b.must(err)
	id := b.Pod(1, 3).Identity()
	svid, err := ca.SVID(spiffeid.RequireFromString(id))
	b.must(err)
	b.good = b.write("good", svid)
	foreign, err := testca.New("elsewhere.example")
	b.must(err)
	svid, err = foreign.SVID(spiffeid.RequireFromString("spiffe://elsewhere.example/ns/demo/sa/x"))
	b.must(err)
	b.bad = b.write("bad", svid)
}

func (b *bench) write(name string, svid *identity.SVID) [2]string {
	b.t.Helper()
	chain, key, err := (&x509svid.SVID{Certificates: svid.Certificates, PrivateKey: svid.Key}).Marshal()
	b.must(err)
	files := [2]string{filepath.Join(b.Dir, name+".pem"), filepath.Join(b.Dir, name+".key")}
	b.must(os.WriteFile(files[0], chain, 0o600))
	b.must(os.WriteFile(files[1], key, 0o600))
	return files
}

// Who shares this machine's processors and would be on a machine of its own. The
// attacker takes all that the others leave, and the other pair's applications and the
// first node's daemon run as soon as they have something to do: what a request waits
// for is the daemon that is attacked. A step of ten is nine times the weight, and less
// for work that this machine may have besides.
const attacking, attacked, elsewhere = 0, -10, -20

// nice sets that of all threads of a process. A thread has it from the one that made
// it; there may be new ones of some that were not seen yet, so it looks again.
func nice(pid, value int) error {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	for again := true; again; {
		again = false
		tasks, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("list the threads of process %d: %w", pid, err)
		}
		for _, task := range tasks {
			tid, _ := strconv.Atoi(task.Name())
			is, err := unix.Getpriority(unix.PRIO_PROCESS, tid) // 20 less its nice, by the kernel's habit
			if err == nil && is != 20-value {
				again = true
				err = unix.Setpriority(unix.PRIO_PROCESS, tid, value)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) { // it has ended
				return fmt.Errorf("set the nice of thread %d: %w", tid, err)
			}
		}
	}
	return nil
}

// start starts this binary in a pod, with an order.
func (b *bench) start(p *lab.Pod, o order, errs io.Writer) (*lab.Process, error) {
	text, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), environment+"="+string(text), "GOMAXPROCS=2")
	cmd.Stderr = errs
	started, err := p.Start(cmd)
	if err != nil {
		return nil, err
	}
	return started, nice(started.PID(), attacking)
}

// attack runs the attacker for a while from the pod that is not enrolled: from the
// addresses of a block, or alone from the pod's.
func (b *bench) attack(name string, length time.Duration, alone bool) (r result, err error) {
	o := b.order.as(name)
	if !alone {
		o.Block = block.String()
	}
	o.ForSeconds = length.Seconds()
	o.Result = filepath.Join(b.Dir, "result.json")
	files := b.good
	if kinds[name].foreign {
		files = b.bad
	}
	o.Cert, o.Key = files[0], files[1]
	var bad, badCallers bytes.Buffer
	p, err := b.start(b.Pod(1, 3), o, &bad)
	if err != nil {
		return r, err
	}
	ctx, cancel := context.WithTimeout(b.ctx, length+time.Minute)
	defer cancel()
	if kinds[name].serve != nil {
		call := o.as("callers")
		call.Target = netip.AddrPortFrom(b.Pod(1, 3).Addr(4), 8080).String()
		callers, err := b.start(b.Pod(2, 1), call, &badCallers)
		if err != nil {
			return r, err
		}
		defer callers.Kill()
	}
	if err := p.Wait(ctx); err != nil {
		_ = p.Signal(unix.SIGQUIT) // says where it hangs
		<-p.Done()
		return r, fmt.Errorf("attacker: %w\n%s", err, bad.String())
	}
	text, err := os.ReadFile(o.Result)
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		return r, fmt.Errorf("attacker: %w\n%s", err, bad.String())
	}
	return r, nil
}
