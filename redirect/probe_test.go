// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/testns"
	"github.com/culvert-mesh/culvert/redirect"
)

// probed are the addresses that a probe connects to, port 9.
var probed = map[bool]netip.Addr{false: netip.MustParseAddr("192.0.0.8"), true: netip.MustParseAddr("100::1")}

// A probe arrives at the outbound listeners, and says what does not work where it
// does not. Nothing leaves the pod then, not even a SYN.
func TestProbe(t *testing.T) {
	both(t, func(w *world, f family) {
		// Somebody outside has the address after all.
		w.in(w.outside, func() error { return addAddr("lo", probed[f.v6]) })
		out := w.listen(w.outside, at(f.any, 9))
		fd, err := w.connect(w.pod, at(probed[f.v6], 9), nil) // the control: it can be reached
		w.must(err)
		w.exchange(fd, w.accept(out))
		w.start()
		fails := func(why string) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), patience/4)
			defer cancel()
			if err := w.redirected.Probe(ctx); err == nil || !strings.Contains(err.Error(), why) {
				t.Errorf("%v, want an error that says %q", err, why)
			}
			w.empty(out)
		}
		works := func() {
			t.Helper()
			n := w.counted(func() { w.must(w.redirected.Probe(t.Context())) })
			if n["connect_probe"] != 2 || n["steer_probe"] != 2 || n["connect_carried"] != 0 {
				t.Errorf("counted %v", n)
			}
			c := w.accept(w.listeners[f.outbound])
			if dst := local(c); dst != at(probed[f.v6], 9) || !redirect.IsProbe(dst.Addr()) || redirect.IsProbe(f.remote) {
				t.Errorf("the tunnel sees the destination %s", dst)
			}
			w.empty(out)
		}
		works()
		// A rule of somebody's before ours.
		nl := unix.AF_INET
		if f.v6 {
			nl = unix.AF_INET6
		}
		mask := uint32(0xffffffff)
		stray := netlink.NewRule()
		stray.Mark, stray.Mask, stray.Table, stray.Priority, stray.Family = 0x53a, &mask, unix.RT_TABLE_MAIN, 7, nl
		w.in(w.pod, func() error { return netlink.RuleAdd(stray) })
		fails("the mark 0x53a leads to")
		w.in(w.pod, func() error { return netlink.RuleDel(stray) })
		works()
		// The hook does not see the pod: its row is gone.
		w.must(w.redirected.Release())
		w.redirected, err = w.node.AddPod(t.Context(), w.podConfig())
		w.must(err)
		for slot, fd := range w.listeners {
			w.must(w.redirected.Listen(slot, fd))
		}
		fails("was not captured")
		w.must(w.redirected.Enrol())
		works()
		// No listener.
		for slot, fd := range w.listeners {
			unix.Close(fd)
			delete(w.listeners, slot)
		}
		fails("was refused by the hook")
		w.open()
		works()
		// The steering is gone, then a hook.
		w.detach("pods/*/steer")
		fails("lookup program is not attached")
		w.detach("connect6")
		fails("the hook connect6 is not attached")
	})
}

// detach takes what is pinned away, as nothing of ours would.
func (w *world) detach(pin string) {
	w.t.Helper()
	pins, err := filepath.Glob(filepath.Join(w.cfg.BPFFS, "culvert/*/v3", pin))
	if err != nil || len(pins) != 1 {
		w.t.Fatalf("pins: %v, %v", pins, err)
	}
	l, err := link.LoadPinnedLink(pins[0], nil)
	w.must(err)
	defer l.Close()
	w.must(l.Detach())
}

// A process outside the hooked cgroup has no sockets that the hooks see: its
// probe looks at what is attached, and where the mark leads.
func TestProbeFromOutsideTheCgroup(t *testing.T) {
	w := newWorld(t)
	w.cfg.Cgroup = testns.Cgroup(t, "outside")
	w.start()
	n := w.counted(func() { w.must(w.redirected.Probe(t.Context())) })
	if len(n) != 0 {
		t.Errorf("counted %v", n)
	}
	// The rule is put back as soon as that is heard: be faster once.
	var without error
	for range 100 {
		w.in(w.pod, func() error {
			rules, err := netlink.RuleListFiltered(unix.AF_INET6, &netlink.Rule{Table: 0x53a}, netlink.RT_FILTER_TABLE)
			if err != nil || len(rules) != 1 {
				return err
			}
			rules[0].Family = unix.AF_INET6
			return netlink.RuleDel(&rules[0])
		})
		if without = w.redirected.Probe(t.Context()); without != nil {
			break
		}
	}
	if without == nil || !strings.Contains(without.Error(), "the mark 0x53a") {
		t.Errorf("without the rule: %v", without)
	}
	w.detach("pods/*/steer")
	if err := w.redirected.Probe(t.Context()); err == nil || !strings.Contains(err.Error(), "lookup program") {
		t.Errorf("without the steering: %v", err)
	}
}

// A foreign program that runs after a connect hook could undo it: it is named,
// once, at the start or at the next enrolment. One that runs before is no matter.
func TestForeignConnectHook(t *testing.T) {
	w := newWorld(t)
	w.cfg.Cgroup = testns.Cgroup(t, "foreign")
	var log bytes.Buffer
	w.cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	foreign := func(name string) link.Link {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: name, Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "MIT",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		w.must(err)
		defer prog.Close()
		l, err := link.AttachCgroup(link.CgroupOptions{Path: w.cfg.Cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: prog})
		w.must(err)
		return l
	}
	named := func(name string) int { return strings.Count(log.String(), "program="+name) }
	before := foreign("lb_before")
	defer before.Close()
	w.start()
	w.must(w.redirected.Probe(t.Context()))
	if named("lb_") != 0 || strings.Contains(log.String(), "another program") {
		t.Errorf("said without reason:\n%s", log.String())
	}
	after := foreign("lb_after")
	defer after.Close()
	for range 2 {
		w.must(w.redirected.Probe(t.Context()))
	}
	if named("lb_after") != 1 || !strings.Contains(log.String(), "socketLB.hostNamespaceOnly=true") {
		t.Errorf("at an enrolment:\n%s", log.String())
	}
	w.must(w.stop())
	log.Reset()
	w.start()
	if named("lb_after") != 1 || named("lb_before") != 0 {
		t.Errorf("at the start:\n%s", log.String())
	}
}
