// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/redirect"
)

// A namespace is one instance's. Another one that is told to enrol it refuses,
// says whose it is, and changes nothing; once it is released it is free.
func TestRivalInstance(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		other := redirect.Config{RunDir: filepath.Join(t.TempDir(), "run"), BPFFS: w.cfg.BPFFS}
		rival, err := redirect.Open(other)
		w.must(err)
		t.Cleanup(func() {
			if err := rival.Close(); err != nil {
				t.Error(err)
			}
			if _, err := redirect.Cleanup(other); err != nil {
				t.Error(err)
			}
		})
		ns, err := netns.Open(w.podPath)
		w.must(err)
		defer ns.Close()
		cfg := w.podConfig()
		cfg.Name, cfg.NS = "default/same", ns
		refused := func(why string) {
			t.Helper()
			before := w.traces()
			if _, err := rival.AddPod(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), why) {
				t.Errorf("%v, want an error that says %q", err, why)
			}
			if after := w.traces(); !slices.Equal(after, before) {
				t.Errorf("what is refused has changed the namespace:\n%s\nit was:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
			}
		}
		refused("run directory: " + w.cfg.RunDir)
		fd, err := w.connect(w.pod, at(f.remote, 8080), nil)
		w.must(err)
		w.exchange(fd, w.accept(w.listeners[f.outbound]))
		w.must(w.redirected.Probe(t.Context()))

		// A dead one's too, until its cleanup.
		w.must(w.stop())
		refused("ztunnel cleanup")
		// Its successor has its own.
		w.start()
		refused("another instance")
		w.must(w.stop())
		if _, err := redirect.Cleanup(w.cfg); err != nil {
			t.Fatal(err)
		}
		// Two at once: the namespace is locked meanwhile.
		again, err := netns.Open(w.podPath)
		w.must(err)
		defer again.Close()
		w.must(unix.Flock(again.FD(), unix.LOCK_EX|unix.LOCK_NB))
		ended := make(chan error)
		go func() {
			p, err := rival.AddPod(t.Context(), cfg)
			if err == nil {
				err = p.Release()
			}
			ended <- err
		}()
		select {
		case err := <-ended:
			t.Errorf("it does not wait for who has the lock: %v", err)
			return
		case <-time.After(100 * time.Millisecond):
		}
		w.must(unix.Flock(again.FD(), unix.LOCK_UN))
		w.must(<-ended)
	})
}

// A process of the pod, which needs no privilege for it, keeps nobody from
// enrolling the pod by holding the lock.
func TestALockedNamespaceIsEnrolled(t *testing.T) {
	w := newWorld(t)
	ns, err := netns.Open(w.podPath)
	w.must(err)
	defer ns.Close()
	w.must(unix.Flock(ns.FD(), unix.LOCK_EX|unix.LOCK_NB))
	w.start()
	w.must(w.redirected.Probe(t.Context()))
}

// A program of somebody else's in the namespace is no rival.
func TestForeignLookupIsNoRival(t *testing.T) {
	w := newWorld(t)
	l := foreignLookup(t, w.pod, "other")
	defer l.Close()
	w.start()
	w.must(w.redirected.Probe(t.Context()))
}

func foreignLookup(t *testing.T, ns *netns.NS, name string) link.Link {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	l, err := link.AttachNetNs(ns.FD(), prog)
	if err != nil {
		t.Fatal(err)
	}
	return l
}
