// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

// load is traffic between all enrolled pods, in both families and directions,
// beside callers of a bait: a pod that the daemons take for a member of the mesh,
// and that takes plaintext. What leaks would be answered, and be seen.
type load struct {
	e       *env
	d       []*lab.Daemon
	cfg     lab.DaemonConfig
	wire    *capture.Capture
	callers []*caller
	all     tally // of the callers
	bait    *caller
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

const baitPod = 3

// answers is how many each caller waits for; the first may have begun before.
const answers = 5

// at is where a pod's application is.
func at(p *lab.Pod, family int) netip.AddrPort { return portOf(p, family, 8080) }

func portOf(p *lab.Pod, family int, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(p.Addr(family), port)
}

// newLoad builds the mesh, with a deadline that suits ten deaths.
func newLoad(t *testing.T) *load {
	t.Helper()
	e := setup(t)
	e.takes(scaled(2 * time.Minute))
	l := &load{e: e}
	workloads := append(e.enrolled(), e.Pod(1, baitPod).Workload(), e.Pod(2, baitPod).Workload())
	l.cfg = lab.DaemonConfig{Workloads: workloads}
	l.d = e.start(l.cfg)
	for _, n := range e.Nodes {
		for _, p := range n.Pods {
			_, err := p.Serve(8080, func(c *net.TCPConn) { _ = answerMessages(c) })
			e.must(err)
		}
	}
	l.wire = e.wire(marker)
	return l
}

// begin starts the callers.
func (l *load) begin() {
	ctx, cancel := context.WithCancel(l.e.ctx)
	l.cancel = cancel
	l.callers = nil
	e := l.e
	add := func(c *caller) *caller {
		l.wg.Go(func() { c.run(ctx) })
		return c
	}
	for i, pair := range [][2]*lab.Pod{
		{e.Pod(1, 1), e.Pod(2, 1)}, {e.Pod(1, 2), e.Pod(2, 2)}, {e.Pod(2, 1), e.Pod(1, 1)}, {e.Pod(2, 2), e.Pod(1, 2)},
	} {
		for _, keep := range []bool{true, false, true, false} {
			l.callers = append(l.callers, add(&caller{tally: &l.all, from: pair[0], to: at(pair[1], 4+i%2*2), keep: keep}))
		}
	}
	l.bait = add(&caller{tally: &tally{}, from: e.Pod(1, 1), to: at(e.Pod(2, baitPod), 4)})
	e.t.Cleanup(l.end)
}

func (l *load) end() {
	l.cancel()
	l.wg.Wait()
}

// served waits until each caller has had answers once more.
func (l *load) served(t *testing.T, what string) {
	t.Helper()
	var before []int64
	for _, c := range l.callers {
		before = append(before, c.done.Load())
	}
	l.e.must(lab.Until(l.e.ctx, what, func() error {
		for i, c := range l.callers {
			if n := c.done.Load(); n < before[i]+answers {
				return fmt.Errorf("%s calls %s (kept: %v): %d answers, and %d before", c.from.Name, c.to, c.keep, n, before[i])
			}
		}
		return nil
	}, l.d[0].Ended, l.d[1].Ended))
}

// start starts a node's daemon and waits until each caller is served. It returns
// how long both took.
func (l *load) start(t *testing.T, i int) (ready, served time.Duration) {
	t.Helper()
	begun := time.Now()
	l.d[i] = l.e.startOn(l.e.Nodes[i], l.cfg)
	ready = time.Since(begun)
	l.served(t, "each caller is served again, which nobody touched")
	return ready, time.Since(begun)
}

// secret holds the wire against what may be on it, with a leak as the control:
// released, the pod that calls the bait is answered.
func (l *load) secret(t *testing.T) {
	t.Helper()
	l.end()
	e := l.e
	plain := func() int {
		n, _ := l.wire.Count(func(s capture.Segment) bool { return s.Between(lab.PodCIDRs()...) && !s.Port(hbonePort) })
		return n
	}
	if n, m := plain(), l.wire.Seen(0); n != 0 || m != 0 {
		t.Errorf("%d segments outside of the tunnel, %d markers", n, m)
	}
	if inside(l.wire) == 0 {
		t.Error("control: the capture saw no tunnel")
	}
	if l.bait.whole.Load() > 0 || l.bait.told.Load() == 0 {
		t.Errorf("the bait answered %d requests, and %d were refused", l.bait.whole.Load(), l.bait.told.Load())
	}
	l.bait.check(t)
	e.must(l.d[0].Stop(e.ctx))
	_, err := l.d[0].Cleanup(e.ctx)
	e.must(err)
	leak := &caller{tally: &tally{}, from: e.Pod(1, 1), to: at(e.Pod(2, baitPod), 4)}
	e.must(leak.request())
	if plain() == 0 || l.wire.Seen(0) == 0 {
		t.Error("control: the capture does not see a released pod's call of the bait")
	}
}

var numbers = regexp.MustCompile(`(id|program) \d+`)

// standing is all that a daemon has in the kernel for its pods, and has written
// down of them.
func (l *load) standing(t *testing.T, i int) string {
	t.Helper()
	var out []string
	n := l.e.Nodes[i]
	for _, p := range n.Pods {
		out = append(out, p.Name+":", numbers.ReplaceAllString(n.State(p), "$1"))
	}
	for _, root := range []string{l.e.pins(l.d[i]), filepath.Join(l.d[i].RunDir(), "pods")} {
		l.e.must(filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			out = append(out, path)
			return err
		}))
	}
	return strings.Join(out, "\n")
}

// spread is the median and the largest.
func spread(d []time.Duration) string {
	slices.Sort(d)
	return fmt.Sprintf("%v (%v)", d[len(d)/2].Round(time.Millisecond), d[len(d)-1].Round(time.Millisecond))
}

// state is what there is of both daemons and of their pods while nothing is asked of
// them.
type state struct {
	standing [2]string
	held     [2]held
	joined   [2]int // sockets that are connected
}

func (l *load) state(t *testing.T) state {
	t.Helper()
	var s state
	for i := range l.d {
		s.standing[i], s.held[i], s.joined[i] = l.standing(t, i), l.e.holds(l.d[i]), l.e.joined(l.d[i])
	}
	return s
}

// unchanged wants the same as before: rules, routes, sysctls, links, pins, what is
// written down, descriptors and goroutines.
func (l *load) unchanged(t *testing.T, before state) {
	t.Helper()
	e := l.e
	for i := range l.d {
		if after := l.standing(t, i); after != before.standing[i] {
			t.Errorf("on node %d there was\n%s\nand is now\n%s", i+1, before.standing[i], after)
		}
		was, is, joined := before.held[i], held{}, 0
		// Sockets in stock come and go with use: they are left out.
		err := lab.Until(e.ctx, "what the traffic took is given back", func() error {
			is, joined = e.holds(l.d[i]), e.joined(l.d[i])
			if joined > before.joined[i]+16 || is.goroutines > was.goroutines+16 || is.kept() != was.kept() {
				return fmt.Errorf("before %v, %d connected; after %v, %d connected", was, before.joined[i], is, joined)
			}
			return nil
		})
		t.Logf("node %d: before %v, %d connected; after %v, %d connected", i+1, was, before.joined[i], is, joined)
		e.must(err)
	}
}

// joined is how many of a daemon's descriptors are connected sockets of its pods.
func (e *env) joined(d *lab.Daemon) int {
	e.t.Helper()
	fds := fmt.Sprintf("/proc/%d/fd", d.PID())
	entries, err := os.ReadDir(fds)
	e.must(err)
	own := map[string]bool{}
	for _, f := range entries {
		target, _ := os.Readlink(filepath.Join(fds, f.Name())) // one that was closed meanwhile
		own[target] = true
	}
	n := 0
	for _, p := range d.Node.Pods {
		sockets, err := sockdiag.List(p.NS, sockdiag.Connected)
		e.must(err)
		for _, s := range sockets {
			if own[fmt.Sprintf("socket:[%d]", s.Inode)] {
				n++
			}
		}
	}
	return n
}

// ready is a mesh under load that has answered every caller, with its state at rest.
func ready(t *testing.T) (*load, state) {
	t.Helper()
	l := newLoad(t)
	l.begin()
	l.served(t, "each caller is served")
	l.end()
	before := l.state(t)
	l.begin()
	l.served(t, "each caller is served")
	if told := l.all.told.Load(); told != 0 {
		t.Errorf("control: %d requests failed while nothing happened", told)
	}
	return l, before
}

// TestRestartUnderLoad: daemons are stopped and started under requests, one node's
// after the other's. Each request is whole or fails with an error, nothing is in
// plaintext, the pods are served again without being touched, and what stands in
// the kernel is the same after as before.
func TestRestartUnderLoad(t *testing.T) {
	const restarts = 10
	l, before := ready(t)
	var ends, readies, again []time.Duration
	for i := range restarts {
		begun := time.Now()
		if err := l.d[i%2].Stop(l.e.ctx); err != nil {
			t.Errorf("the daemon of %s ended with %v", l.e.Nodes[i%2].Name, err)
		}
		ends = append(ends, time.Since(begun))
		ready, served := l.start(t, i%2)
		readies, again = append(readies, ready), append(again, served)
	}
	l.end()
	t.Logf("%d restarts: %s; median (most): end %s, ready %s, all callers served %s", restarts, &l.all, spread(ends), spread(readies), spread(again))
	l.all.check(t)
	if l.all.told.Load() == 0 {
		t.Error("control: no request noticed that daemons ended")
	}
	l.unchanged(t, before)
	l.secret(t)
}
