// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

func echo(c net.Conn) {
	if _, err := io.Copy(c, c); err == nil {
		_ = c.(*net.TCPConn).CloseWrite()
	}
}

func TestExchangeAndCleanEnd(t *testing.T) {
	for _, loops := range []int{1, 2} {
		r := newRig(t, loops, echo)
		c := r.dial()
		for _, size := range []int{1, 100, 16375, 16376, 70000, 1 << 20} {
			want := make([]byte, size)
			rand.Read(want)
			go func() { _, _ = c.Write(want) }()
			got := make([]byte, size)
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d loops, %d bytes: came back different, %v", loops, size, err)
			}
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
			t.Fatalf("after the half-close: %q, %v", b, err)
		}
		a, b := r.bothEnds()
		if a.how != relay.EndClean || b.how != relay.EndClean || a.sent != b.received || a.received != b.sent {
			t.Fatalf("ends %+v and %+v, want clean ones that agree", a, b)
		}
	}
}

func TestManyStreamsAtOnce(t *testing.T) {
	r := newRig(t, 2, echo)
	var all sync.WaitGroup
	for i := range 100 {
		c := r.dial()
		all.Go(func() {
			want := bytes.Repeat([]byte(fmt.Sprintf("stream %d;", i)), 20000)
			go func() { _, _ = c.Write(want); _ = c.CloseWrite() }()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("stream %d: %d bytes of %d, %v", i, len(got), len(want), err)
			}
		})
	}
	all.Wait()
}

func TestStuckReaderStallsNobody(t *testing.T) {
	release, stuck := make(chan struct{}), make(chan struct{})
	var others atomic.Bool // the first one is stuck
	r := newRig(t, 2, func(c net.Conn) {
		if !others.Swap(true) {
			close(stuck)
			<-release
			_, _ = io.Copy(io.Discard, c)
			return
		}
		echo(c)
	})
	let := sync.OnceFunc(func() { close(release) })
	t.Cleanup(let)
	s := r.dial()
	receive(t, stuck, "the stuck application") // another might else be the first to run
	wrote := make(chan struct{})
	go func() { defer close(wrote); _, _ = s.Write(make([]byte, 64<<20)) }()
	var all sync.WaitGroup
	for range 99 {
		c := r.dial()
		all.Go(func() {
			msg := bytes.Repeat([]byte("m"), 100<<10)
			go func() { _, _ = c.Write(msg) }()
			if _, err := io.ReadFull(c, make([]byte, len(msg))); err != nil {
				t.Errorf("a sibling of the stuck stream: %v", err)
			}
		})
	}
	all.Wait()
	select {
	case <-wrote:
		t.Error("the stuck stream was not stuck")
	default:
	}
	let()
	<-wrote
	_ = s.CloseWrite()
}

// Each half closes on its own, in either order, and the other goes on.
func TestHalfCloses(t *testing.T) {
	const size = 3 << 20
	send := func(c net.Conn, seed byte) {
		_, _ = c.Write(bytes.Repeat([]byte{seed}, size))
		_ = c.(*net.TCPConn).CloseWrite()
	}
	check := func(t *testing.T, who string, c net.Conn, seed byte) {
		b, err := io.ReadAll(c)
		if err != nil || len(b) != size || bytes.Count(b, []byte{seed}) != size {
			t.Errorf("%s got %d bytes of %d, %v", who, len(b), size, err)
		}
	}
	for _, first := range []string{"client", "server"} {
		t.Run(first+" first", func(t *testing.T) {
			r := newRig(t, 2, func(c net.Conn) {
				if first == "client" {
					check(t, "server", c, 1)
					send(c, 2)
				} else {
					send(c, 2)
					check(t, "server", c, 1)
				}
			})
			c := r.dial()
			if first == "client" {
				send(c, 1)
				check(t, "client", c, 2)
			} else {
				check(t, "client", c, 2)
				send(c, 1)
			}
			a, b := r.bothEnds()
			if a.how != relay.EndClean || b.how != relay.EndClean || a.sent != size || a.received != size || b.sent != size || b.received != size {
				t.Fatalf("ends %+v and %+v", a, b)
			}
		})
	}
}

// What the application sends before the peer has answered waits in its own
// socket, its end included.
func TestApplicationSendsBeforeTheAnswer(t *testing.T) {
	r := emptyRig(t, rigConfig{})
	p := r.facing(true)
	p.settle()
	c := r.dial()
	want := bytes.Repeat([]byte("early "), 10_000)
	if _, err := c.Write(want[:6]); err != nil {
		t.Fatal(err)
	}
	req := until[*http2.HeadersFrame](p)
	go func() { _, _ = c.Write(want[6:]); _ = c.CloseWrite() }()
	// A PING comes behind whatever would have been sent.
	p.must(p.fr.WritePing(false, [8]byte{1}))
	if f, ok := p.frame().(*http2.PingFrame); !ok {
		t.Fatalf("%v was sent before the answer", f)
	}
	p.headers(req.StreamID, ":status", "200")
	var got []byte
	for {
		f := until[*http2.DataFrame](p)
		got = append(got, f.Data()...)
		if f.StreamEnded() {
			break
		}
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%d bytes came, want %d", len(got), len(want))
	}
	p.must(p.fr.WriteData(req.StreamID, true, []byte("answer")))
	if b, err := io.ReadAll(c); err != nil || string(b) != "answer" {
		t.Fatalf("%q, %v", b, err)
	}
	if e := r.end(); e.how != relay.EndClean || e.sent != uint64(len(want)) || e.received != 6 {
		t.Fatalf("end %+v", e)
	}
}

// Data and even the end come with the request, before there is an application,
// and before it is reached.
func TestEarlyDataReachesTheApplication(t *testing.T) {
	for _, when := range []string{"before the relay", "before the connect", "at once"} {
		t.Run(when, func(t *testing.T) {
			got := make(chan []byte, 1)
			asked := make(chan func(step string), 1)
			r := emptyRig(t, rigConfig{
				serve: func(c net.Conn, _ string) {
					b, err := io.ReadAll(c)
					if err != nil {
						t.Error(err)
					}
					got <- b
					_, _ = c.Write([]byte("answer"))
				},
				request: func(w *relay.Worker, _ *relay.Trunk, _ *h2.Stream, serve func() *relay.Relay) {
					var rl *relay.Relay
					step := func(s string) {
						switch s {
						case "relay":
							rl = serve()
						case "connect":
							rl.Established()
						}
					}
					switch when {
					case "at once":
						step("relay")
						step("connect")
						step = func(string) {}
					case "before the connect":
						step("relay")
						relayed := step
						step = func(s string) {
							if s == "connect" {
								relayed(s)
							}
						}
					}
					asked <- step
				},
			})
			p := r.facing(false)
			p.settle()
			want := bytes.Repeat([]byte("early "), 10_000)
			p.headers(1, ":method", "CONNECT", ":authority", "10.0.0.1:80")
			for i := 0; i < len(want); i += 10_000 {
				p.must(p.fr.WriteData(1, i+10_000 >= len(want), want[i:i+10_000]))
			}
			p.must(p.fr.WritePing(false, [8]byte{1})) // answered: all of it has been read
			until[*http2.PingFrame](p)
			step := receive(t, asked, "the request")
			on(r.server, func() { step("relay") })
			on(r.server, func() { step("connect") })
			if b := receive(t, got, "the early data"); !bytes.Equal(b, want) {
				t.Fatalf("the application got %d bytes of %d", len(b), len(want))
			}
			if f := until[*http2.DataFrame](p); string(f.Data()) != "answer" {
				t.Fatalf("answer %q", f.Data())
			}
			if e := r.end(); e.how != relay.EndClean || e.received != uint64(len(want)) || e.sent != 6 {
				t.Fatalf("end %+v", e)
			}
		})
	}
}

// The connection's window is one for all streams. Used up, it holds everybody
// until it is given back, and then everybody goes on.
func TestConnectionWindowRunsOut(t *testing.T) {
	const streams, each, window = 5, 40_000, 65_535
	r := emptyRig(t, rigConfig{})
	p := r.facing(true)
	p.settle(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	want := map[uint32][]byte{}
	for range streams {
		c := r.dial()
		id := until[*http2.HeadersFrame](p).StreamID
		want[id] = bytes.Repeat([]byte{byte(id)}, each)
		if _, err := c.Write(want[id]); err != nil {
			t.Fatal(err)
		}
		_ = c.CloseWrite()
	}
	for id := range want {
		p.headers(id, ":status", "200")
	}
	got := map[uint32][]byte{}
	total, ended := 0, 0
	read := func() {
		f := until[*http2.DataFrame](p)
		got[f.StreamID] = append(got[f.StreamID], f.Data()...)
		total += len(f.Data())
		if f.StreamEnded() {
			ended++
		}
	}
	for total < window {
		read()
	}
	p.must(p.fr.WritePing(false, [8]byte{1}))
	switch f := p.frame().(type) {
	case *http2.PingFrame:
	case *http2.DataFrame: // an end needs no window
		if len(f.Data()) > 0 {
			t.Fatalf("%d bytes sent beyond the connection's window", len(f.Data()))
		}
		ended++
	}
	if total != window {
		t.Fatalf("%d bytes sent into a window of %d", total, window)
	}
	for ended < streams {
		p.must(p.fr.WriteWindowUpdate(0, 1000)) // in small pieces
		for upto := min(total+1000, streams*each); total < upto; {
			read()
		}
		if total == streams*each {
			for ended < streams {
				read()
			}
		}
	}
	for id := range want {
		if !bytes.Equal(got[id], want[id]) {
			t.Errorf("stream %d: %d bytes of %d", id, len(got[id]), len(want[id]))
		}
	}
}
