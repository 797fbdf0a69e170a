// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/relay"
)

func abort(c net.Conn) {
	_ = c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

// pattern is data whose every position shows.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> (i % 5))
	}
	return b
}

func TestResetCrosses(t *testing.T) {
	for _, from := range []string{"client", "server"} {
		saw := make(chan error, 1)
		r := newRig(t, 2, func(c net.Conn) {
			if from == "server" {
				_, _ = io.ReadFull(c, make([]byte, 1))
				abort(c)
				return
			}
			_, err := io.Copy(io.Discard, c)
			saw <- err
		})
		c := r.dial()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if from == "client" {
			abort(c)
		} else {
			go func() { _, err := io.ReadAll(c); saw <- err }()
		}
		if err := receive(t, saw, "the reset"); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("reset by the %s: the other end saw %v", from, err)
		}
		a, b := r.bothEnds()
		if from == "server" {
			a, b = b, a
		}
		if a.how != relay.EndAppReset || b.how != relay.EndPeerReset {
			t.Errorf("reset by the %s: ends %+v and %+v", from, a, b)
		}
	}
}

// Data followed by a reset. The relay must read to the error, not wait for an
// edge that does not come; and where it may not read, because the other end has
// no window, it must end without. Whatever came through is a prefix.
func TestDataFollowedByResetNeverHangs(t *testing.T) {
	want := pattern(1 << 20)
	for _, tt := range []struct {
		name   string
		n      int
		size   func(i int) int
		answer bool // the stream is open before the reset comes
		held   bool // the loop sees data and reset at once: before its wait
		read   bool // the far application reads
	}{
		{"before a wait", 1000, func(i int) int { return 1 + i*60 }, true, true, true},
		{"during a wait", 1000, func(i int) int { return 1 + i*60 }, true, false, true},
		{"before the answer", 300, func(i int) int { return 1 + i*60 }, false, false, true},
		{"behind the window, before a wait", 100, func(i int) int { return 128<<10 + i*1000 }, true, true, false},
		{"behind the window, during a wait", 100, func(i int) int { return 128<<10 + i*1000 }, true, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			type seen struct {
				n   int
				err error
			}
			saw := make(chan seen, tt.n)
			stuck := make(chan struct{})
			let := sync.OnceFunc(func() { close(stuck) })
			// What the relay reads is all there before the reset, and buffers
			// of a far application that does not read hold less than the window.
			far := 0
			if !tt.read {
				far = 4 << 10
			}
			r := newRigWith(t, rigConfig{loops: 2, buffers: 256 << 10, farBuffers: far, serve: func(c net.Conn, _ string) {
				if tt.answer {
					_, _ = c.Write([]byte("!"))
				}
				if !tt.read {
					<-stuck
				}
				b, err := io.ReadAll(c)
				if !bytes.Equal(b, want[:len(b)]) {
					err = fmt.Errorf("%d bytes that are no prefix", len(b))
				}
				saw <- seen{len(b), err}
			}})
			t.Cleanup(let)
			n := 0
			for i := 0; i < tt.n; i += pace {
				n++
				c := r.dial()
				if tt.answer {
					if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
						t.Fatal(err)
					}
				}
				release := func() {}
				if tt.held {
					release = hold(r.client)
				}
				if !tt.read {
					_ = c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
				}
				_, _ = c.Write(want[:tt.size(i)])
				abort(c)
				release()
				// One at a time: the next would tell the loop of the last.
				a, b := r.bothEnds()
				if a.how != relay.EndAppReset || b.how != relay.EndPeerReset || b.received > a.sent {
					t.Fatalf("connection %d of %d bytes: ends %+v and %+v", i, tt.size(i), a, b)
				}
				switch {
				case tt.held && tt.read && a.sent != uint64(tt.size(i)):
					t.Fatalf("connection %d: %d bytes of %d were read before the reset", i, a.sent, tt.size(i))
				case tt.held && !tt.read && (a.sent < 64<<10 || a.sent >= uint64(tt.size(i))):
					t.Fatalf("connection %d: %d bytes of %d were read: the window did not matter", i, a.sent, tt.size(i))
				}
			}
			let()
			for i := range n {
				if s := receive(t, saw, "what the server saw"); !errors.Is(s.err, unix.ECONNRESET) {
					t.Fatalf("server %d saw %v after %d bytes, want a reset", i, s.err, s.n)
				}
			}
		})
	}
}

// An application that resets while its stream has no window is let go, however
// long it had been waiting.
func TestResetWhileBlockedByTheWindow(t *testing.T) {
	release := make(chan struct{})
	saw := make(chan error, 1)
	r := newRigWith(t, rigConfig{loops: 2, buffers: 16 << 10, farBuffers: 16 << 10, serve: func(c net.Conn, _ string) {
		<-release
		_, err := io.ReadAll(c)
		saw <- err
	}})
	let := sync.OnceFunc(func() { close(release) })
	t.Cleanup(let)
	c := r.dial()
	blocked := func() bool {
		_ = c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		_, err := c.Write(make([]byte, 1<<20))
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	for !blocked() {
	}
	abort(c)
	a, b := r.bothEnds()
	if a.how != relay.EndAppReset || b.how != relay.EndPeerReset {
		t.Fatalf("ends %+v and %+v", a, b)
	}
	let()
	if err := receive(t, saw, "the reset"); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("the server saw %v", err)
	}
}

// A peer's reset ends a relay whose application has not taken what was queued
// for it; the rest is dropped, and the reset is not held back by it.
func TestPeerResetWithDataQueued(t *testing.T) {
	want := pattern(8 << 20)
	var r *rig
	wrote := make(chan struct{})
	r = newRigWith(t, rigConfig{loops: 2, buffers: 4 << 10, farBuffers: 16 << 10, serve: func(c net.Conn, _ string) {
		_ = c.SetWriteDeadline(time.Now().Add(1500 * time.Millisecond))
		_, _ = c.Write(want)
		close(wrote)
		abort(c)
	}})
	c := r.dial()
	receive(t, wrote, "the server's data")
	a, b := r.bothEnds()
	if a.how != relay.EndPeerReset || b.how != relay.EndAppReset || a.received >= b.sent {
		t.Fatalf("ends %+v and %+v, want data that was not delivered", a, b)
	}
	got, err := io.ReadAll(c)
	if !errors.Is(err, unix.ECONNRESET) || !bytes.Equal(got, want[:len(got)]) {
		t.Fatalf("the client got %d bytes, %v", len(got), err)
	}
}

// RFC 9113, section 8.1: a peer that has said everything may reset with
// NO_ERROR to be sent no more. Everything it said arrives, then its end.
func TestResetWithoutAnErrorAfterTheEndIsClean(t *testing.T) {
	for i := range 3 {
		queued := i > 0
		cfg := rigConfig{}
		if queued {
			cfg.buffers = 8 << 10
		}
		r := emptyRig(t, cfg)
		p := r.facing(true)
		p.settle()
		c := r.dial()
		id := until[*http2.HeadersFrame](p).StreamID
		p.headers(id, ":status", "200")
		// The application is in the middle of sending.
		if _, err := c.Write([]byte("some of it")); err != nil {
			t.Fatal(err)
		}
		until[*http2.DataFrame](p)
		want := pattern(80_000)
		first := want[:60_000]
		send := func(b []byte, end bool) {
			for ; len(b) > 0; b = b[10_000:] {
				p.must(p.fr.WriteData(id, end && len(b) == 10_000, b[:10_000]))
			}
		}
		if !queued {
			want = first
		}
		release := func() {}
		if queued {
			// More than the kernel takes, so that the rest is queued.
			send(first, false)
			for window := 64<<10 - len(first); window < 20_000; {
				if f := until[*http2.WindowUpdateFrame](p); f.StreamID == id {
					window += int(f.Increment)
				}
			}
			release = hold(r.client)
		}
		if queued {
			send(want[60_000:], true)
		} else {
			send(want, true)
		}
		p.must(p.fr.WriteRSTStream(id, http2.ErrCodeNo))
		if _, err := c.Write([]byte("that nobody wants")); err != nil && queued {
			t.Fatal(err)
		}
		release()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("queued %v: the application's data: %v", queued, err)
		}
		if n, err := c.Read(got); n != 0 || !errors.Is(err, io.EOF) {
			t.Fatalf("queued %v: behind it came %d bytes, %v, want the end", queued, n, err)
		}
		if e := r.end(); e.how != relay.EndClean || e.received != uint64(len(want)) {
			t.Fatalf("queued %v: end %+v", queued, e)
		}
	}
	// In the middle of what it has to say it is a reset like any other.
	r := emptyRig(t, rigConfig{})
	p := r.facing(true)
	p.settle()
	c := r.dial()
	id := until[*http2.HeadersFrame](p).StreamID
	p.headers(id, ":status", "200")
	p.must(p.fr.WriteData(id, false, []byte("half of")))
	p.must(p.fr.WriteRSTStream(id, http2.ErrCodeNo))
	if b, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) || string(b) != "half of" {
		t.Fatalf("got %q, %v", b, err)
	}
	if e := r.end(); e.how != relay.EndPeerReset {
		t.Fatalf("end %+v", e)
	}
}

func TestLostTrunkResetsBothApplications(t *testing.T) {
	saw := make(chan error, 1)
	r := newRig(t, 2, func(c net.Conn) {
		_, _ = io.ReadFull(c, make([]byte, 1))
		_, _ = c.Write([]byte("y"))
		_, err := io.Copy(io.Discard, c)
		saw <- err
	})
	c := r.dial()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	on(r.client, func() { r.trunk.Close(errors.New("gone")) })
	if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client saw %v, want a reset", err)
	}
	if err := receive(t, saw, "the reset"); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the server saw %v, want a reset", err)
	}
	a, b := r.bothEnds()
	if a.how != relay.EndTrunkLost || b.how != relay.EndTrunkLost {
		t.Errorf("ends %+v and %+v", a, b)
	}
}

// A relay that has ended is given to nobody: its number may be another's.
func TestEndedRelayIsNotDetached(t *testing.T) {
	r := newRig(t, 1, echo)
	a, c := r.appPair(0)
	defer c.Close()
	rl, err := r.open(a)
	if err != nil {
		t.Fatal(err)
	}
	on(r.client, func() {
		rl.Abort(http2.ErrCodeCancel, "")
		if fd := rl.Detach(); fd != -1 {
			t.Errorf("an ended relay gave descriptor %d away", fd)
		}
		rl.Established()
		rl.Open()
		rl.Ready(0xffff)
	})
	if e := r.end(); e.how != relay.EndAborted {
		t.Fatalf("end %+v", e)
	}
}
