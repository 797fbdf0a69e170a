// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// held is what a daemon holds, by kind.
type held struct {
	descriptors, goroutines int
	namespaces              int // descriptors that keep one alive
	rules, routes           int // in its pods' namespaces
	links, states, pins     int
	memory                  float64 // resident, MiB
}

// kept is all that does not vary with traffic.
func (h held) kept() held {
	return held{namespaces: h.namespaces, rules: h.rules, routes: h.routes, links: h.links, states: h.states, pins: h.pins}
}

func (h held) String() string {
	return fmt.Sprintf("%d descriptors, %d goroutines, %d namespaces, %d rules, %d routes, %d links, %d written states, %d pins, %.0f MiB",
		h.descriptors, h.goroutines, h.namespaces, h.rules, h.routes, h.links, h.states, h.pins, h.memory)
}

// holds looks at a daemon from outside.
func (e *env) holds(d *lab.Daemon) held {
	e.t.Helper()
	var h held
	h.descriptors = int(e.sum(d, "process_open_fds"))
	h.goroutines = int(e.sum(d, "go_goroutines"))
	h.memory = e.sum(d, "process_resident_memory_bytes") / (1 << 20)
	ours := map[uint64]bool{} // other tests of the machine have links too
	for _, p := range d.Node.Pods {
		var st syscall.Stat_t
		e.must(syscall.Stat(p.NetnsPath(), &st))
		ours[st.Ino] = true
		e.must(p.NS.Do(func() error {
			rules, err := netlink.RuleList(netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			tables := map[int]bool{}
			for _, r := range rules {
				if r.Mark != 0 {
					h.rules++
					tables[r.Table] = true
				}
			}
			for table := range tables {
				routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
				if err != nil {
					return err
				}
				h.routes += len(routes)
			}
			return nil
		}))
	}
	fds := fmt.Sprintf("/proc/%d/fd", d.PID())
	entries, err := os.ReadDir(fds)
	e.must(err)
	for _, f := range entries {
		var fs unix.Statfs_t
		if unix.Statfs(filepath.Join(fds, f.Name()), &fs) == nil && fs.Type == unix.NSFS_MAGIC {
			h.namespaces++
		}
	}
	var it link.Iterator
	defer it.Close()
	for it.Next() {
		if info, err := it.Link.Info(); err == nil {
			if ns := info.NetNs(); ns != nil && ours[uint64(ns.NetnsInode)] {
				h.links++
			}
		}
	}
	e.must(it.Err())
	states, err := filepath.Glob(filepath.Join(d.RunDir(), "pods", "*"))
	e.must(err)
	h.states = len(states)
	e.must(filepath.WalkDir(e.pins(d), func(string, fs.DirEntry, error) error { h.pins++; return nil }))
	return h
}

// pins is where a daemon pins, as its log says.
func (e *env) pins(d *lab.Daemon) string {
	e.t.Helper()
	b, err := os.ReadFile(d.LogFile)
	e.must(err)
	_, rest, ok := strings.Cut(string(b), "bpffs=")
	if !ok {
		e.t.Fatalf("%s does not say where it pins", d.LogFile)
	}
	pins, _, _ := strings.Cut(rest, " ")
	return pins
}

// 500 pods are enrolled and released under the traffic of another, fifty at a
// time: nothing of them is left.
func TestManyPodsComeAndGo(t *testing.T) {
	const at = 50
	rounds := max(2, 10/int(lab.Slowness()))
	e := setupWith(t, at+1)
	e.takes(3 * time.Minute * lab.Slowness())
	var d []*lab.Daemon
	for _, n := range e.Nodes {
		d = append(d, e.startOn(n, lab.DaemonConfig{Pods: n.Pods[:1], Workloads: e.Workloads()}))
	}
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	few := []podEntry{entryOf(e.Pod(1, 1))}
	many := few
	for _, p := range e.Nodes[0].Pods[1:] {
		many = append(many, entryOf(p))
	}
	traffic := e.steady(e.Pod(1, 1), app.Addr(4))
	e.setPods(d[0], many...) // what is made once is made by then
	e.setPods(d[0], few...)
	before := e.holds(d[0])
	var most held
	var slowest time.Duration
	for range rounds {
		begun := time.Now()
		e.setPods(d[0], many...)
		slowest = max(slowest, time.Since(begun))
		most = e.holds(d[0])
		last := e.Nodes[0].Pods[at]
		e.must(e.call(last, app.Addr(6)))
		e.setPods(d[0], few...)
	}
	if most.descriptors < before.descriptors+at || most.namespaces < before.namespaces+at || most.rules < before.rules+2*at || most.routes < before.routes+2*at ||
		most.links < before.links+at || most.states < before.states+at || most.pins < before.pins+at {
		t.Errorf("control: with %d pods more it holds %v, without them %v", at, most, before)
	}
	traffic.whole(t, 1)
	var after held
	err = lab.Until(e.ctx, "what the pods took is given back", func() error {
		after = e.holds(d[0])
		if after.descriptors > before.descriptors+16 || after.goroutines > before.goroutines+16 || after.kept() != before.kept() || after.memory > before.memory*1.5+16 {
			return fmt.Errorf("before %v; after %v", before, after)
		}
		return nil
	})
	t.Logf("%d enrolments, %d at a time (at most %v with the wait for the file): before %v; with them %v; after %v", at*rounds, at, slowest.Round(10*time.Millisecond), before, most, after)
	e.must(err)
	for _, p := range e.Nodes[0].Pods[1:] {
		if left := e.Nodes[0].State(p); left != "" {
			t.Errorf("left in %s:\n%s", p.Name, left)
		}
	}
}
