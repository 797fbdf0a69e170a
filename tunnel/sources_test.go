// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/tunnel/relay"
)

func address(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }

// Handshakes: at each limit, and one above it.
func TestHandshakeLimits(t *testing.T) {
	var l limits
	s := newSources(relay.NewBudget(0, nil), &l, 0)
	var running []*source
	greet := func(a netip.Addr, want bool) {
		t.Helper()
		src, err := s.greet(a)
		if (err == nil) != want {
			t.Fatalf("handshake %d of %s: %v", len(running)+1, a, err)
		}
		if err == nil {
			running = append(running, src)
		}
	}
	for range maxSourceHandshakes {
		greet(address(0), true)
	}
	greet(address(0), false)
	for i := maxSourceHandshakes; i < maxHandshakes; i++ {
		greet(address(i), true)
	}
	greet(address(maxHandshakes), false)
	if l.sourceHandshakes.Load() != 1 || l.handshakes.Load() != 1 {
		t.Errorf("%d and %d were counted, want 1 each", l.sourceHandshakes.Load(), l.handshakes.Load())
	}
	s.greeted(running[0])
	greet(address(maxHandshakes), true)
	greet(address(maxHandshakes), false)
	for _, src := range running[1:] {
		s.greeted(src)
	}
	for _, src := range running {
		s.part(src)
	}
	if s.all != 0 || len(s.known) != 0 || s.budget.Open() != 0 {
		t.Errorf("%d handshakes, %d addresses and %d bytes are left", s.all, len(s.known), s.budget.Open())
	}
}

// Sessions of one address: as many as its part of the budget holds.
func TestSessionLimit(t *testing.T) {
	const size = 64 << 20
	var l limits
	s := newSources(relay.NewBudget(size, nil), &l, 0)
	n := 0
	for {
		src, err := s.greet(address(0))
		if err != nil {
			break
		}
		s.greeted(src)
		n++
	}
	if want := size / 2 / 4 / relay.SessionCost; n != want || l.sessions.Load() != 1 {
		t.Fatalf("%d sessions of one address, %d refusals counted, want %d and 1", n, l.sessions.Load(), want)
	}
	if _, err := s.greet(address(1)); err != nil {
		t.Errorf("another address: %v", err)
	}
}

// Connections in plaintext: at each limit, and one above it.
func TestPlainLimits(t *testing.T) {
	const most = 5 * plainPart
	var l limits
	s := newSources(relay.NewBudget(0, nil), &l, most)
	var open []*source
	enter := func(a netip.Addr, want bool) {
		t.Helper()
		src, err := s.enter(a)
		if (err == nil) != want {
			t.Fatalf("connection %d of %s: %v", len(open)+1, a, err)
		}
		if err == nil {
			open = append(open, src)
		}
	}
	for i := range plainPart {
		for range most / plainPart {
			enter(address(i), true)
		}
		if i == 0 {
			enter(address(i), false)
		}
	}
	enter(address(plainPart), false)
	s.leave(open[0])
	enter(address(plainPart), true)
	enter(address(0), false)
	for _, src := range open[1:] {
		s.leave(src)
	}
	if s.plain != 0 || len(s.known) != 0 {
		t.Errorf("%d connections and %d addresses are left", s.plain, len(s.known))
	}
	// Where there may be few, an address may have one.
	if _, err := newSources(relay.NewBudget(0, nil), &l, 1).enter(address(0)); err != nil {
		t.Error(err)
	}
}

// The log has so many lines of a kind in a second, and no more.
func TestDamper(t *testing.T) {
	var d damper
	now := time.Unix(1000, 0)
	for i := range saidEverySecond + 3 {
		if held, ok := d.say(now); ok != (i < saidEverySecond) || held != 0 {
			t.Fatalf("line %d: %v, %d", i, ok, held)
		}
	}
	if held, ok := d.say(now.Add(time.Second)); !ok || held != 3 {
		t.Errorf("a second later: %v, %d were held back, want 3", ok, held)
	}
}

// A line says how many like it were left out before it, if any.
func TestDamperWarn(t *testing.T) {
	var d damper
	var said strings.Builder
	log := slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	d.warn(log, "one", "n", 1)
	d.held = 3
	d.warn(log, "two", "n", 2)
	const want = "level=WARN msg=one n=1\nlevel=WARN msg=two n=2 unsaid=3\n"
	if said.String() != want {
		t.Errorf("said %q, want %q", said.String(), want)
	}
	d.said = saidEverySecond
	d.since = time.Now().Add(time.Hour) // this second lasts
	d.warn(log, "three")
	if said.String() != want || d.held != 1 || d.unsaid.Load() != 1 {
		t.Errorf("said %q, held back %d, %d in all", said.String(), d.held, d.unsaid.Load())
	}
}
