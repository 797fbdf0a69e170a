// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// hoarding is a rig whose server's applications take nothing, unless their port
// is 81: those take everything.
func hoarding(t *testing.T, memory int64) *rig {
	reads := func(authority string) bool { return strings.HasSuffix(authority, ":81") }
	return emptyRig(t, rigConfig{
		memory: memory,
		clog:   func(authority string) bool { return !reads(authority) },
		serve: func(c net.Conn, authority string) {
			if reads(authority) {
				_, _ = io.Copy(io.Discard, c)
				return
			}
			<-t.Context().Done()
		},
	})
}

// hoarder opens n streams and sends as much as fits into their windows.
func (p *peer) hoarder(n, bytes int) {
	p.t.Helper()
	p.enc.SetMaxDynamicTableSize(0)
	for i := range n {
		p.headers(uint32(2*i+1), ":method", "CONNECT", ":authority", "10.0.0.1:80")
		for left := bytes; left > 0; left -= 16 << 10 {
			p.must(p.fr.WriteData(uint32(2*i+1), false, make([]byte, min(left, 16<<10))))
		}
	}
}

// wait polls on the worker's thread.
func wait(t *testing.T, w *relay.Worker, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); ; {
		ok := false
		on(w, func() { ok = f() })
		if ok {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// One peer's queues stay within its part, by resets of those whose applications
// take nothing; a stream that drains is spared, and the session goes on. Below
// the bound nothing is reset.
func TestHoardersOfAPeer(t *testing.T) {
	const window = 64 << 10
	const memory = 8 << 20
	const part = memory / 2 / relay.PeerPart // 1 MiB
	for _, n := range []int{part/window - 2, 4 * part / window} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			r := hoarding(t, memory)
			p := r.facing(false)
			p.settle()
			go func() { _, _ = io.Copy(io.Discard, p.conn) }() // answers are not looked at
			// The one that drains.
			id := uint32(2*n + 1)
			p.hoarder(n, window)
			p.headers(id, ":method", "CONNECT", ":authority", "10.0.0.1:81")
			var before int
			on(r.server, func() { before = r.received(id) })
			p.must(p.fr.WriteData(id, false, make([]byte, 16<<10)))
			wait(t, r.server, "the stream that drains got its data", func() bool { return r.received(id) == before+16<<10 })
			queued := r.budget.Queued()
			// What the sockets' buffers took is not queued.
			if over := n*window > part; over != (r.shed.Load() > 0) || queued > part || !over && queued < part/2 {
				t.Fatalf("%d streams of %d bytes: %d reset, %d bytes queued, %d allowed", n, window, r.shed.Load(), queued, part)
			}
			on(r.server, func() { r.far.Close(io.EOF) })
			if r.budget.Queued() != 0 {
				t.Errorf("%d bytes are queued with no session", r.budget.Queued())
			}
		})
	}
}

// received is what the application of the far trunk's stream was given; -1: there
// is none. It runs on the server's thread.
func (r *rig) received(id uint32) int {
	n := 0
	if st := r.far.Session().H2.Stream(id); st != nil {
		if rl, ok := st.User.(*relay.Relay); ok {
			n = int(rl.Received())
		}
	}
	return n
}

// The reset says ENHANCE_YOUR_CALM.
func TestHoarderIsTold(t *testing.T) {
	r := hoarding(t, 1<<20) // 128 KiB for a peer
	p := r.facing(false)
	p.settle()
	p.hoarder(8, 64<<10)
	if f := until[*http2.RSTStreamFrame](p); f.ErrCode != http2.ErrCodeEnhanceYourCalm {
		t.Fatalf("the stream was reset with %v", f.ErrCode)
	}
	p.must(p.fr.WritePing(false, [8]byte{}))
	until[*http2.PingFrame](p) // the session goes on
}

// Several peers, each within its part, are bounded together, over all loops: also
// what an idle loop holds is given up.
func TestHoardersOfANode(t *testing.T) {
	const memory = 4 << 20 // 2 MiB to be queued, 512 KiB of one peer, 1 MiB of a loop
	r := hoarding(t, memory)
	one, two := r.worker(), r.worker()
	peerOn := func(w *relay.Worker) {
		p := r.facingOn(w, false)
		p.settle()
		go func() { _, _ = io.Copy(io.Discard, p.conn) }()
		p.hoarder(7, 64<<10) // 448 KiB
	}
	for range 4 {
		peerOn(one)
	}
	wait(t, one, "four peers' bytes are queued", func() bool { return r.budget.Queued() >= 4*7*64<<10 })
	if r.shed.Load() != 0 {
		t.Fatalf("%d streams are reset below the bound", r.shed.Load())
	}
	peerOn(two) // which holds less than its share
	wait(t, two, "the first loop's streams have been reset", func() bool { return r.shed.Load() > 0 && r.budget.Queued() <= memory/2 })
	if n := r.budget.Queued(); n < memory/4 {
		t.Errorf("%d bytes are queued, of %d allowed: too much was reset", n, memory/2)
	}
}

// Whose application has taken nothing for a while goes first, also where others
// hold more.
func TestIdleHoardersGoFirst(t *testing.T) {
	r := hoarding(t, 8<<20) // 1 MiB for a peer
	p := r.facing(false)
	p.settle()
	go func() { _, _ = io.Copy(io.Discard, p.conn) }()
	const idle = 8
	p.hoarder(idle, 16<<10) // what is to be freed
	wait(t, r.server, "they are queued", func() bool { return r.budget.Queued() >= idle*16<<10 })
	later := make(chan struct{})
	on(r.server, func() { r.server.Loop.After(relay.HoardTime+100*time.Millisecond, func() { close(later) }) })
	receive(t, later, "a second")
	for i := range 15 {
		id := uint32(2*(idle+i) + 1)
		p.headers(id, ":method", "CONNECT", ":authority", "10.0.0.1:80")
		for range 4 {
			p.must(p.fr.WriteData(id, false, make([]byte, 16<<10)))
		}
	}
	wait(t, r.server, "streams are reset", func() bool { return r.shed.Load() > 0 })
	if e := r.end(); e.how != relay.EndHoard {
		t.Errorf("a stream ended as %+v", e)
	}
	on(r.server, func() {
		if st := r.far.Session().H2.Stream(1); st != nil {
			t.Error("an idle stream is still there")
		}
	})
}

// What a peer may hold open: at the limit and one above, alone and with others
// that have used all up.
func TestAccount(t *testing.T) {
	const half = 1 << 20
	if n := relay.NewBudget(0, nil).Size(); n != relay.DefaultMemory {
		t.Errorf("unless it is told the budget is %d bytes, want %d", n, relay.DefaultMemory)
	}
	b := relay.NewBudget(2*half, nil)
	fill := func(a *relay.Account, n int64) int64 {
		got := int64(0)
		for range n / relay.StreamCost {
			if !a.Open(relay.StreamCost) {
				break
			}
			got += relay.StreamCost
		}
		return got
	}
	var all []*relay.Account
	for i := range relay.PeerPart {
		a := b.Account()
		all = append(all, a)
		if got := fill(a, 2*half); got != half/relay.PeerPart {
			t.Fatalf("peer %d may hold %d bytes open, want %d", i, got, half/relay.PeerPart)
		}
	}
	late := b.Account()
	if got := fill(late, 2*half); got != half/relay.FloorPart {
		t.Fatalf("a peer that comes late may hold %d bytes open, want %d", got, half/relay.FloorPart)
	}
	all[0].Close(half / relay.PeerPart)
	late.Close(half / relay.FloorPart)
	if got := fill(late, 2*half); got != half/relay.PeerPart {
		t.Fatalf("with room again it may hold %d bytes open, want %d", got, half/relay.PeerPart)
	}
	if b.Open() != half {
		t.Fatalf("%d bytes are open, want %d", b.Open(), half)
	}
}

// Windows do not grow while memory is scarce.
func TestWindowsDoNotGrowWhileTight(t *testing.T) {
	const memory = 64 << 20 // a peer's part of it, an eighth, holds all that is sent
	for _, tight := range []bool{false, true} {
		r := newRigWith(t, rigConfig{memory: memory, serve: func(c net.Conn, _ string) { discardAll(c) }})
		if tight {
			on(r.server, func() { r.far.Meter(memory/8/2 + 1) })
		}
		c := r.dial()
		for range 64 {
			if _, err := c.Write(make([]byte, 64<<10)); err != nil {
				t.Fatal(err)
			}
		}
		wait(t, r.server, "the application has it all", func() bool {
			return r.received(1) == 64*64<<10
		})
		on(r.server, func() {
			if w := r.far.Session().H2.Stream(1).Window(); (w > 64<<10) == tight {
				t.Errorf("tight %v: the window is %d", tight, w)
			}
		})
		if tight {
			on(r.server, func() { r.far.Meter(-(memory/8/2 + 1)) })
		}
	}
}

// What a peer has queued is given back at its end, also where it takes the stream
// back and breaks the rules in one breath.
func TestAccountIsEvenWhenThePeerBreaksTheRules(t *testing.T) {
	r := emptyRig(t, rigConfig{request: func(*relay.Worker, *relay.Trunk, *h2.Stream, func() *relay.Relay) {}})
	p := r.facing(false)
	p.settle()
	p.hoarder(1, 32<<10)
	wait(t, r.server, "its data is queued", func() bool { return r.budget.Queued() > 32<<10-1 })
	_, err := p.rc.Write([]byte{
		0, 0, 4, byte(http2.FrameRSTStream), 0, 0, 0, 0, 1, 0, 0, 0, byte(http2.ErrCodeCancel),
		0, 0, 0, byte(http2.FrameData), 0, 0, 0, 0, 0, // of stream 0
	})
	p.must(err)
	r.trunkEnd()
	on(r.server, func() {})
	if n := r.budget.Queued(); n != 0 {
		t.Errorf("%d bytes are counted still", n)
	}
}
