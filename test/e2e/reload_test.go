// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/culvert-mesh/culvert/admin"
	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// podEntry is an entry of a pods file.
type podEntry struct {
	Name           string       `yaml:"name"`
	Namespace      string       `yaml:"namespace"`
	ServiceAccount string       `yaml:"serviceAccount"`
	Netns          string       `yaml:"netns"`
	Addresses      []netip.Addr `yaml:"addresses"`
}

func entryOf(p *lab.Pod) podEntry {
	return podEntry{Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, Netns: p.NetnsPath(), Addresses: p.Addrs()}
}

// text is what a file of entries holds.
func (e *env) text(key string, entries any) string {
	e.t.Helper()
	b, err := yaml.Dump(map[string]any{key: entries})
	e.must(err)
	return string(b)
}

// replace puts a file of a daemon in place by a rename, as editors and
// ConfigMaps do.
func (e *env) replace(n *lab.Node, name, text string) {
	e.t.Helper()
	path := filepath.Join(n.Dir, name)
	e.must(os.WriteFile(path+".new", []byte(text), 0o600))
	e.must(os.Rename(path+".new", path))
}

// reloads waits until a daemon has counted one more reload of a file.
func (e *env) reloads(d *lab.Daemon, file, result string, change func()) {
	e.t.Helper()
	count := func() float64 { return e.sum(d, "culvert_config_reloads_total", "file", file, "result", result) }
	before := count()
	change()
	e.must(lab.Until(e.ctx, fmt.Sprintf("%s has read its %s again: %s", d.Node.Name, file, result), func() error {
		if n := count(); n <= before {
			return fmt.Errorf("%v reloads, and %v before", n, before)
		}
		return nil
	}))
}

func (e *env) setPods(d *lab.Daemon, pods ...podEntry) {
	e.t.Helper()
	e.reloads(d, "pods", "ok", func() { e.replace(d.Node, "pods.yaml", e.text("pods", pods)) })
	e.settled(d, len(pods))
}

// settled waits until a daemon's pods are ready, and none is on its way.
func (e *env) settled(d *lab.Daemon, ready int) {
	e.t.Helper()
	e.must(lab.Until(e.ctx, fmt.Sprintf("%d pods of %s are ready", ready, d.Node.Name), func() error {
		m, err := d.Metrics(e.ctx)
		if err != nil {
			return err
		}
		all, is := m.Sum("culvert_pods"), m.Sum("culvert_pods", "state", "ready")
		if all != float64(ready) || is != all {
			return fmt.Errorf("%v of %v are", is, all)
		}
		return nil
	}))
}

func (e *env) setWorkloads(ws []lab.Workload, ds ...*lab.Daemon) {
	e.t.Helper()
	for _, d := range ds {
		e.reloads(d, "workloads", "ok", func() { e.replace(d.Node, "workloads.yaml", e.text("workloads", ws)) })
	}
}

const noRules = "rules: []\n"

func denial(name string, p *lab.Pod) string {
	return fmt.Sprintf("rules:\n- name: %s\n  denySource: [%s]\n", name, p.Identity())
}

// ruled is a mesh whose daemons have a policy file.
func ruled(t *testing.T) (*env, []*lab.Daemon) {
	t.Helper()
	e := setup(t)
	for _, n := range e.Nodes {
		e.replace(n, "policy.yaml", noRules)
	}
	return e, e.start(lab.DaemonConfig{Settings: map[string]any{"policy": map[string]any{"file": "policy.yaml"}}})
}

// call is an exchange on a connection of its own, which it closes. It leaves
// nothing to the end of the test, and may be called from any goroutine.
func (e *env) call(from *lab.Pod, dst netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(e.ctx, scaled(5*time.Second))
	defer cancel()
	c, err := from.Dial(ctx, dst)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(scaled(5 * time.Second))); err != nil {
		return err
	}
	return exchange(c, marker)
}

// status is what the admin socket says of a daemon.
func (e *env) status(d *lab.Daemon) string {
	e.t.Helper()
	var b []byte
	e.must(admin.Get(e.ctx, admin.Socket(d.RunDir()), "/status", &b))
	return string(b)
}

// carried wants an exchange on a new connection to each of these, in the tunnel.
func (e *env) carried(from *lab.Pod, to ...netip.AddrPort) {
	e.t.Helper()
	wire := e.wire(marker)
	for _, dst := range to {
		e.must(exchange(e.connect(from, dst), marker))
	}
	if wire.Seen(0) != 0 || outside(wire) != 0 || inside(wire) == 0 {
		e.t.Errorf("%s is not carried: markers in plaintext %d, other segments %d, bytes in the tunnel %d", from.Name, wire.Seen(0), outside(wire), inside(wire))
	}
}

// inPlaintext wants an exchange on a new connection, and to see it on the wire.
func (e *env) inPlaintext(from *lab.Pod, to netip.AddrPort) {
	e.t.Helper()
	wire := e.wire(marker)
	e.must(exchange(e.connect(from, to), marker))
	if wire.Seen(0) == 0 {
		e.t.Errorf("the traffic of %s to %s is not on the wire", from.Name, to)
	}
}

// Pods come and go by the file while another's traffic is not disturbed.
func TestReload(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	one, two, three := e.Pod(1, 1), e.Pod(1, 2), e.Pod(1, 3)
	plain, err := e.Pod(2, 3).Echo(8080) // not of the mesh
	e.must(err)
	traffic := e.steady(one, app.Addr(4))

	// A pod less: as without the mesh, and nothing of it is left.
	held := e.connect(two, app.Addr(4))
	e.must(exchange(held, "before"))
	if e.Nodes[0].State(two) == "" {
		t.Error("control: nothing is found in an enrolled pod")
	}
	e.setPods(d[0], entryOf(one))
	if _, err := io.ReadAll(held); !isReset(err) {
		t.Errorf("a removed pod's connection ended with %v, want a reset", err)
	}
	if left := e.Nodes[0].State(two); left != "" {
		t.Errorf("left in the removed pod:\n%s", left)
	}
	e.inPlaintext(two, plain.Addr(4))
	if err := e.try(two, app.Addr(4)); !isRefused(err) {
		t.Errorf("plaintext to a STRICT workload: %v, want it refused", err)
	}

	// And two more, at once by SIGHUP. New connections are carried.
	e.setWorkloads(append(e.enrolled(), three.Workload()), d...)
	e.replace(d[0].Node, "pods.yaml", e.text("pods", []podEntry{entryOf(one), entryOf(two), entryOf(three)}))
	e.must(d[0].Signal(syscall.SIGHUP))
	e.settled(d[0], 3)
	e.carried(two, app.Addr(4), app.Addr(6))
	e.carried(three, app.Addr(4), app.Addr(6))
	traffic.whole(t, 1)
}

// SIGHUP reads the files at once, and the daemon lives.
func TestHangup(t *testing.T) {
	userSpace(t)
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	traffic := e.steady(e.Pod(1, 1), app.Addr(6))
	for range 5 {
		for _, file := range []string{"pods", "workloads", "ca"} {
			e.reloads(d[0], file, "ok", func() { e.must(d[0].Signal(syscall.SIGHUP)) })
		}
	}
	e.settled(d[0], 2)
	if err := d[0].Ended(); err != nil {
		t.Errorf("after SIGHUP: %v", err)
	}
	traffic.whole(t, 1)
}

// A released pod's traffic is plaintext again, the log says so, and nothing is left.
func TestRelease(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		app, err := e.Pod(2, 3).Echo(8080)
		e.must(err)
		secure, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		wire := e.wire(marker)
		e.must(exchange(e.connect(e.Pod(1, 1), secure.Addr(family)), marker))
		if wire.Seen(0) != 0 {
			t.Error("control: the marker is on the wire before the release")
		}
		e.setPods(d[0], entryOf(e.Pod(1, 2)))
		if left := e.Nodes[0].State(e.Pod(1, 1)); left != "" {
			t.Errorf("left behind:\n%s", left)
		}
		e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(family)), marker))
		if wire.Seen(0) == 0 {
			t.Error("the released pod's traffic is not on the wire")
		}
		if log := d[0].LogTail(10); !strings.Contains(log, "pod released") || !strings.Contains(log, "plaintext") {
			t.Errorf("the log does not say so:\n%s", log)
		}
	})
}

// A pod that runs when it is enrolled: its new connections are carried.
func TestEnrolRunning(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		app, err := e.Pod(2, 3).Echo(8080)
		e.must(err)
		three := e.Pod(1, 3)
		e.inPlaintext(three, app.Addr(family)) // the control, before the enrolment
		e.setWorkloads(e.Workloads(), d...)
		e.setPods(d[0], entryOf(e.Pod(1, 1)), entryOf(e.Pod(1, 2)), entryOf(three))
		e.setPods(d[1], entryOf(e.Pod(2, 1)), entryOf(e.Pod(2, 2)), entryOf(e.Pod(2, 3)))
		e.carried(three, app.Addr(family))
	})
}

// A denial reaches a connection that lives; one of another identity stays.
func TestDenialReachesLiveConnections(t *testing.T) {
	userSpace(t)
	families(t, func(t *testing.T, family int) {
		e, d := ruled(t)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		denied, control := e.connect(e.Pod(1, 1), app.Addr(family)), e.connect(e.Pod(1, 2), app.Addr(family))
		e.must(exchange(denied, "before"))
		e.must(exchange(control, "before"))
		e.reloads(d[1], "policy", "ok", func() { e.replace(d[1].Node, "policy.yaml", denial("no-first", e.Pod(1, 1))) })
		if _, err := io.ReadAll(denied); !isReset(err) {
			t.Errorf("a connection that is denied by now ended with %v, want a reset", err)
		}
		line := e.line(d[1], "inbound", app.Addr(family))
		if line.String("reason") != "denied" || line.String("detail") != "no-first" || line.String("src.identity") != e.Pod(1, 1).Identity() {
			t.Errorf("the access log has %v", line)
		}
		if err := e.try(e.Pod(1, 1), app.Addr(family)); err == nil {
			t.Error("a new connection of the denied identity was served")
		}
		e.must(exchange(control, "after"))
		// Taken back, it is served again.
		e.reloads(d[1], "policy", "ok", func() { e.replace(d[1].Node, "policy.yaml", noRules) })
		e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(family)), "again"))
		e.must(exchange(control, "again"))
	})
}

// Many more connections than a turn takes are all rechecked.
func TestDenialReachesManyConnections(t *testing.T) {
	userSpace(t)
	const many = 1200
	e, d := ruled(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	var conns []*net.TCPConn
	for range many {
		c := e.connect(e.Pod(1, 1), app.Addr(4))
		e.must(exchange(c, "x"))
		conns = append(conns, c)
	}
	control := e.connect(e.Pod(1, 2), app.Addr(4))
	e.must(exchange(control, "before"))
	e.reloads(d[1], "policy", "ok", func() { e.replace(d[1].Node, "policy.yaml", denial("no-first", e.Pod(1, 1))) })
	for i, c := range conns {
		if _, err := io.ReadAll(c); !isReset(err) {
			t.Fatalf("connection %d of %d ended with %v, want a reset", i, many, err)
		}
	}
	e.must(exchange(control, "after"))
	e.must(lab.Until(e.ctx, "all are counted as denied", func() error {
		if n := e.sum(d[1], "culvert_connections_closed_total", "reporter", "destination", "reason", "denied"); n != many {
			return fmt.Errorf("%v of %d are", n, many)
		}
		return nil
	}))
}

// A broken file changes nothing, is counted and named with its line, and is taken
// once it is mended.
func TestBrokenFileKeepsTheState(t *testing.T) {
	userSpace(t)
	e, d := ruled(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	traffic := e.steady(e.Pod(1, 1), app.Addr(4))
	e.reloads(d[0], "policy", "ok", func() { e.replace(d[0].Node, "policy.yaml", denial("no-other", e.Pod(2, 2))) })
	own, err := e.Pod(1, 1).Echo(8081)
	e.must(err)
	for _, broken := range []struct{ file, text, where string }{
		{"pods", "pods:\n- name: x\n  netns: relative\n  addresses: [10.0.0.1]\n", "pods.yaml:3:"},
		{"workloads", "workloads:\n- name: x\n  addresses: [10.77.2.300]\n", "workloads.yaml:3:"},
		{"workloads", "workloads: [\n", "workloads.yaml:"},
		{"policy", "rules:\n- name: x\n  denySource: [nobody]\n", "policy.yaml:3:"},
	} {
		path := filepath.Join(d[0].Node.Dir, broken.file+".yaml")
		good, err := os.ReadFile(path)
		e.must(err)
		e.reloads(d[0], broken.file, "error", func() { e.replace(d[0].Node, broken.file+".yaml", broken.text) })
		if log := d[0].LogTail(5); !strings.Contains(log, broken.where) {
			t.Errorf("the log does not name %s:\n%s", broken.where, log)
		}
		if s := e.status(d[0]); !strings.Contains(s, broken.where) {
			t.Errorf("the status does not name %s:\n%s", broken.where, s)
		}
		e.settled(d[0], 2)
		e.must(exchange(e.connect(e.Pod(1, 2), app.Addr(6)), "kept"))
		if err := e.try(e.Pod(2, 2), own.Addr(4)); err == nil {
			t.Errorf("the rule in force before is not, after a broken %s", broken.file)
		}
		// SIGHUP says it again.
		e.reloads(d[0], broken.file, "error", func() { e.must(d[0].Signal(syscall.SIGHUP)) })
		e.reloads(d[0], broken.file, "ok", func() { e.replace(d[0].Node, broken.file+".yaml", string(good)) })
	}
	e.reloads(d[0], "pods", "error", func() { e.must(os.Remove(filepath.Join(d[0].Node.Dir, "pods.yaml"))) })
	e.settled(d[0], 2)
	e.must(exchange(e.connect(e.Pod(1, 2), app.Addr(6)), "kept"))
	traffic.whole(t, 1)
}

// A workload that was hbone is tcp, and back: each new connection is as its file
// says, and the traffic of others is not disturbed.
func TestProtocolFlips(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		flipped, err := e.Pod(2, 2).Echo(8080)
		e.must(err)
		traffic := e.steady(e.Pod(1, 1), app.Addr(family))
		as := func(protocol string) []lab.Workload {
			ws := e.enrolled()
			ws[3].Protocol = protocol
			return ws
		}
		held := e.connect(e.Pod(1, 2), flipped.Addr(family))
		e.must(exchange(held, "before"))
		for range 2 {
			// Its own node takes it out of the mesh, so that plaintext is answered.
			e.setPods(d[1], entryOf(e.Pod(2, 1)))
			e.setWorkloads(as("tcp"), d...)
			e.inPlaintext(e.Pod(1, 2), flipped.Addr(family))
			e.setWorkloads(as("hbone"), d...)
			e.setPods(d[1], entryOf(e.Pod(2, 1)), entryOf(e.Pod(2, 2)))
			e.carried(e.Pod(1, 2), flipped.Addr(family))
		}
		traffic.whole(t, 1)
	})
}

// A workload that vanishes, or whose address is another's: what lives to it ends.
func TestDestinationVanishes(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	other, err := e.Pod(2, 2).Echo(8080)
	e.must(err)
	for name, change := range map[string]func([]lab.Workload) []lab.Workload{
		"vanished":         func(ws []lab.Workload) []lab.Workload { return append(ws[:2:2], ws[3]) },
		"another identity": func(ws []lab.Workload) []lab.Workload { ws[2].ServiceAccount = "usurper"; return ws },
	} {
		held, control := e.connect(e.Pod(1, 1), app.Addr(4)), e.connect(e.Pod(1, 1), other.Addr(4))
		e.must(exchange(held, "before"))
		e.must(exchange(control, "before"))
		e.setWorkloads(change(e.enrolled()), d[0])
		if _, err := io.ReadAll(held); !isReset(err) {
			t.Errorf("%s: a connection to it ended with %v, want a reset", name, err)
		}
		if err := e.try(e.Pod(1, 1), app.Addr(4)); err == nil {
			t.Errorf("%s: a new connection was served", name)
		}
		e.must(exchange(control, "after"))
		found, err := d[0].WaitAccessLog(e.ctx, 1, func(l lab.Entry) bool {
			return l.String("dst.addr") == app.Addr(4).String() && l.String("reason") == "unknown_destination"
		})
		if err != nil {
			t.Errorf("%s: %v, %v", name, found, err)
		}
		e.setWorkloads(e.enrolled(), d[0]) // as it was
		e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(4)), "again"))
		e.must(exchange(control, "again"))
	}
}

// A pod replaced in its own namespace is refused in between, never in plaintext.
func TestReplacedInPlaceLeaksNothing(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	wire := e.wire(marker)
	calls, stop := context.WithCancel(e.ctx)
	var served, refused atomic.Int64
	var caller sync.WaitGroup
	caller.Go(func() {
		for calls.Err() == nil {
			if e.call(e.Pod(1, 1), app.Addr(4)) == nil {
				served.Add(1)
			} else {
				refused.Add(1)
			}
		}
	})
	defer caller.Wait()
	defer stop()
	for i := range 10 {
		next := entryOf(e.Pod(1, 1))
		if i%2 == 0 { // under another name, under another service account
			next.Name = fmt.Sprintf("name%d", i)
		} else {
			next.ServiceAccount = fmt.Sprintf("sa%d", i)
		}
		e.setPods(d[0], next, entryOf(e.Pod(1, 2)))
	}
	stop()
	caller.Wait()
	t.Logf("%d calls served, %d refused meanwhile", served.Load(), refused.Load())
	if n := outside(wire); n != 0 || wire.Seen(0) != 0 {
		t.Errorf("%d payload-bearing segments in plaintext", n)
	}
	// The destination is STRICT and answers a SYN by a reset: that one was sent is
	// all that a leak would show.
	if n, _ := wire.Count(func(s capture.Segment) bool {
		return s.Has(capture.SYN) && s.Between(lab.PodCIDRs()...) && !s.Port(hbonePort)
	}); n != 0 {
		t.Errorf("%d connections went out in plaintext", n)
	}
	if served.Load() == 0 {
		t.Error("control: no call was served at all")
	}
	e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(4)), marker))
}
