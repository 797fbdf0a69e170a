// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/redirect"
)

// events reads the node's events until the test ends.
func (w *world) events() <-chan redirect.Event {
	w.t.Helper()
	out := make(chan redirect.Event, 1<<16)
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error)
	node := w.node
	go func() { done <- node.Events(ctx, func(e redirect.Event) { out <- e }) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	return out
}

// next waits for an event.
func (w *world) next(events <-chan redirect.Event) redirect.Event {
	w.t.Helper()
	select {
	case e := <-events:
		return e
	case <-time.After(patience):
		w.t.Fatal("no event")
		return redirect.Event{}
	}
}

// What is refused, and what leaves in plaintext by configuration, is told of:
// who, where to, when. What is carried is not.
func TestEvents(t *testing.T) {
	both(t, func(w *world, f family) {
		out := w.listen(w.outside, at(f.any, 8080))
		w.start()
		w.must(w.node.SetMeshCIDRs(append(prefixes("10.98.0.0/16"), prefixes("fd98::/16")...)))
		w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{
			f.remote: redirect.DestinationHBONE, f.outside: redirect.DestinationTCP,
		}))
		events := w.events()
		begin := time.Now()
		_, err := w.connect(w.pod, at(f.remote, 8080), nil) // carried: not told of
		w.must(err)
		unknown := at(f.remote.Next(), 81)
		if err := w.connectUnprivileged(w.pod, unknown, nil); !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
		if _, err := w.connect(w.pod, at(f.outside, 8080), nil); err != nil {
			t.Fatal(err)
		}
		w.accept(out)
		var from netip.AddrPort
		if _, err := w.connect(w.outside, at(f.pod, 82), func(fd int) error {
			err := unix.Bind(fd, sockaddr(at(f.outside, 0)))
			from = local(fd)
			return err
		}); !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
		carried, err := w.connect(w.pod, at(f.remote, 8080), nil)
		w.must(err)
		if err := unix.SetsockoptInt(carried, unix.SOL_SOCKET, unix.SO_MARK, 0); !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
		exe, err := os.Executable()
		w.must(err)
		comm := filepath.Base(exe)
		const pod = "default/pod"
		for _, want := range []redirect.Event{
			{Pod: pod, Decision: "connect_refused_unknown", Src: at(f.pod, 0), Dst: unknown, UID: 65534, Comm: comm[:min(len(comm), 15)]},
			{Pod: pod, Decision: "tcp_destination", Src: at(f.pod, 0), Dst: at(f.outside, 8080), Comm: comm[:min(len(comm), 15)]},
			{Pod: pod, Decision: "strict_refused", Src: from, Dst: at(f.pod, 82)},
			{Pod: pod, Decision: "option_refused", Src: local(carried), Dst: at(f.remote, 8080)},
		} {
			got := w.next(events)
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{}), cmpopts.IgnoreFields(redirect.Event{}, "Time")); diff != "" {
				t.Errorf("event (-want, +got):\n%s", diff)
			}
			if got.Time.Before(begin.Add(-time.Millisecond)) || got.Time.After(time.Now().Add(time.Millisecond)) {
				t.Errorf("%s: at %s, since %s", got.Decision, got.Time, begin)
			}
		}
	})
}

// Events are bounded: what nobody reads is lost and counted, and nobody waits.
// What was kept is read by the next process.
func TestEventsAreBounded(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.must(w.node.SetMeshCIDRs(prefixes("10.98.0.0/16")))
	const calls = 4000
	n := w.counted(func() {
		w.in(w.pod, func() error {
			for range calls {
				fd, err := tcp(false)
				if err != nil {
					return err
				}
				err = unix.Connect(fd, sockaddr(at(remote4.Next(), 80)))
				unix.Close(fd)
				if !errors.Is(err, unix.ECONNREFUSED) {
					return err
				}
			}
			return nil
		})
	})
	lost := n["event_lost"]
	if n["connect_refused_unknown"] != calls || lost == 0 || lost > calls/2 {
		t.Errorf("counted %v", n)
	}
	w.must(w.stop())
	w.start()
	events := w.events()
	for range calls - int(lost) {
		if e := w.next(events); e.Decision != "connect_refused_unknown" || e.Dst != at(remote4.Next(), 80) {
			t.Fatalf("event %+v", e)
		}
	}
	// Then there is room again.
	if n := w.counted(func() {
		w.refused("again", func() error { _, err := w.connect(w.pod, at(remote4.Next(), 80), nil); return err })
	}); n["event_lost"] != 0 {
		t.Errorf("counted %v", n)
	}
	if e := w.next(events); !strings.HasPrefix(e.Decision, "connect_refused") {
		t.Errorf("event %+v", e)
	}
}

// Who floods the ring has it read in shares, with rests between them: here each
// event that is taken makes the next one.
func TestAFloodOfEventsIsReadInShares(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.must(w.node.SetMeshCIDRs(prefixes("10.98.0.0/16")))
	const events = 7000
	const atLeast = 200 * time.Millisecond // two rests
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var first time.Time
	n := 0
	w.in(w.pod, func() error {
		knock := func() {
			if fd, err := tcp(false); err == nil {
				_ = unix.Connect(fd, sockaddr(at(remote4.Next(), 80)))
				unix.Close(fd)
			}
		}
		knock()
		knock()
		return w.node.Events(ctx, func(redirect.Event) {
			if n++; n == 1 {
				first = time.Now()
			} else if n == events {
				cancel()
			}
			knock()
		})
	})
	if took := time.Since(first); n < events || took < atLeast {
		t.Errorf("%d events in %s", n, took)
	}
}
