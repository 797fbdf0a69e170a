// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

func TestDrainLetsStreamsEnd(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run("by the "+side, func(t *testing.T) {
			r := newRig(t, 2, echo)
			c := r.dial()
			exchange(t, c)
			if side == "client" {
				on(r.client, r.trunk.Drain)
			} else {
				on(r.server, r.far.Drain)
			}
			exchange(t, c)
			exchange(t, c) // by now both know
			a, late := r.appPair(0)
			defer late.Close()
			if _, err := r.open(a); !errors.Is(err, h2.ErrGoingAway) {
				t.Fatalf("a draining trunk opened a stream: %v", err)
			}
			_ = c.CloseWrite()
			if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
				t.Fatalf("%q, %v", b, err)
			}
			x, y := r.bothEnds()
			if x.how != relay.EndClean || y.how != relay.EndClean {
				t.Fatalf("ends %+v and %+v", x, y)
			}
			for range 2 {
				if e := r.trunkEnd(); !errors.Is(e.err, relay.ErrDrained) {
					t.Errorf("the %s's trunk ended with: %v", e.side, e.err)
				}
			}
			on(r.client, func() {
				if !r.trunk.Closed() || r.trunk.Streams() != 0 {
					t.Error("the trunk is not closed")
				}
			})
		})
	}
}

func exchange(t *testing.T, c net.Conn) {
	t.Helper()
	want := pattern(1000)
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("came back different: %v", err)
	}
}

// A stream whose application is still being reached keeps a draining trunk.
func TestDrainWaitsForStreamsWithoutARelay(t *testing.T) {
	type asked struct {
		w     *relay.Worker
		serve func() *relay.Relay
	}
	const idle = 200 * time.Millisecond // what a loaded machine takes to begin
	requests := make(chan asked, 1)
	r := newRigWith(t, rigConfig{
		loops:  2,
		server: relay.TrunkConfig{IdleAfter: idle},
		serve:  func(c net.Conn, _ string) { echo(c) },
		request: func(w *relay.Worker, _ *relay.Trunk, _ *h2.Stream, serve func() *relay.Relay) {
			requests <- asked{w, serve}
		},
	})
	c := r.dial()
	req := receive(t, requests, "the request")
	on(r.client, r.trunk.Drain)
	// The server has read the GOAWAY once it answers what comes behind it.
	ponged(t, r)
	fired := make(chan struct{})
	on(r.server, func() { r.server.Loop.After(2*idle, func() { close(fired) }) })
	receive(t, fired, "twice the idle time")
	on(r.server, func() {
		if r.far.Closed() {
			t.Error("the trunk closed under a stream that waits for its application")
			return
		}
		req.serve().Established()
	})
	exchange(t, c)
	_ = c.CloseWrite()
	if _, err := io.ReadAll(c); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if e := r.trunkEnd(); !errors.Is(e.err, relay.ErrDrained) {
			t.Errorf("the %s's trunk ended with: %v", e.side, e.err)
		}
	}
}

// A stream that is taken back before there is a relay leaves nothing, early data
// included: the trunk can drain.
func TestStreamTakenBackBeforeItsRelayIsForgotten(t *testing.T) {
	for _, code := range []http2.ErrCode{http2.ErrCodeCancel, http2.ErrCodeNo} {
		r := emptyRig(t, rigConfig{request: func(*relay.Worker, *relay.Trunk, *h2.Stream, func() *relay.Relay) {}})
		p := r.facing(false)
		p.settle()
		p.headers(1, ":method", "CONNECT", ":authority", "10.0.0.1:80")
		p.must(p.fr.WriteData(1, true, []byte("early")))
		p.must(p.fr.WriteRSTStream(1, code))
		p.must(p.fr.WritePing(false, [8]byte{1}))
		until[*http2.PingFrame](p)
		on(r.server, r.far.Drain)
		if e := r.trunkEnd(); !errors.Is(e.err, relay.ErrDrained) {
			t.Errorf("%v: the trunk ended with: %v", code, e.err)
		}
	}
}

// ponged waits until the server has read what the client has sent.
func ponged(t *testing.T, r *rig) {
	t.Helper()
	on(r.client, func() { r.trunk.Ping() })
	poll(t, "an answer to a PING", func() (answered bool) {
		on(r.client, func() { answered = !r.trunk.Pinging() })
		return answered
	})
}

func poll(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come", what)
		}
	}
}

func TestIdleTrunkCloses(t *testing.T) {
	started := time.Now()
	r := newRigWith(t, rigConfig{
		loops:  2,
		client: relay.TrunkConfig{IdleAfter: 20 * time.Millisecond},
		serve:  func(c net.Conn, _ string) { echo(c) },
	})
	a, b := r.trunkEnd(), r.trunkEnd()
	if a.side == "server" {
		a, b = b, a
	}
	if !errors.Is(a.err, relay.ErrIdle) || !errors.Is(b.err, relay.ErrDrained) {
		t.Fatalf("trunks ended with %v and %v", a.err, b.err)
	}
	if d := time.Since(started); d < 20*time.Millisecond {
		t.Fatalf("idle after %v", d)
	}
}

// When the peer's certificate ends, a trunk takes no new streams; those that are
// open go on, and it ends with the last.
func TestTrunkDrainsWhenThePeersTimeIsOver(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		for name, ping := range map[string]time.Duration{"by itself": 0, "beside other limits": time.Hour} {
			t.Run(side+" "+name, func(t *testing.T) {
				until := time.Now().Add(300 * time.Millisecond)
				cfg := rigConfig{loops: 2, serve: func(c net.Conn, _ string) { echo(c) }}
				limits := relay.TrunkConfig{Until: until, PingAfter: ping}
				if side == "client" {
					cfg.client = limits
				} else {
					cfg.server = limits
				}
				r := newRigWith(t, cfg)
				c := r.dial()
				exchange(t, c)
				late := func() error {
					a, b := r.appPair(0)
					defer b.Close()
					rel, err := r.open(a)
					if err == nil {
						on(r.client, func() { rel.Abort(http2.ErrCodeCancel, "enough") })
					}
					return err
				}
				if err := late(); err != nil && time.Now().Before(until) {
					t.Fatalf("the control, before its end: %v", err)
				}
				poll(t, "the end of new streams", func() bool {
					return time.Now().After(until) && errors.Is(late(), h2.ErrGoingAway)
				})
				exchange(t, c)
				_ = c.CloseWrite()
				if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
					t.Fatalf("%q, %v", b, err)
				}
				for range 2 {
					if e := r.trunkEnd(); !errors.Is(e.err, relay.ErrDrained) {
						t.Errorf("the %s's trunk ended with: %v", e.side, e.err)
					}
				}
			})
		}
	}
}

// A trunk without streams ends with the peer's certificate.
func TestTrunkWithoutStreamsEndsWithThePeersCertificate(t *testing.T) {
	const left = 50 * time.Millisecond
	until := time.Now().Add(left)
	r := newRigWith(t, rigConfig{loops: 2, server: relay.TrunkConfig{Until: until, IdleAfter: time.Hour}, serve: func(c net.Conn, _ string) { echo(c) }})
	for range 2 {
		if e := r.trunkEnd(); !errors.Is(e.err, relay.ErrDrained) {
			t.Errorf("the %s's trunk ended with: %v", e.side, e.err)
		}
	}
	if time.Now().Before(until.Add(-left / 2)) { // when the client is told
		t.Error("it ended too early")
	}
}

// A client is told of the end before it comes: what it asks for until then is
// served, so that nothing that crosses the GOAWAY is lost.
func TestTheEndIsAnnounced(t *testing.T) {
	end := time.Now().Add(500 * time.Millisecond)
	r := emptyRig(t, rigConfig{server: relay.TrunkConfig{Until: end}, serve: func(c net.Conn, _ string) { echo(c) }})
	p := r.facing(false)
	p.settle()
	if f := until[*http2.GoAwayFrame](p); f.LastStreamID != 1<<31-1 || f.ErrCode != http2.ErrCodeNo || time.Now().After(end) {
		t.Fatalf("the first GOAWAY is %v", f)
	}
	p.headers(1, ":method", "CONNECT", ":authority", "10.0.0.1:80")
	if f := until[*http2.HeadersFrame](p); f.StreamID != 1 || time.Now().After(end) {
		t.Fatalf("the answer is %v", f)
	}
	if f := until[*http2.GoAwayFrame](p); f.LastStreamID != 1 || f.ErrCode != http2.ErrCodeNo || time.Now().Before(end) {
		t.Fatalf("the last GOAWAY is %v", f)
	}
	p.headers(3, ":method", "CONNECT", ":authority", "10.0.0.1:80")
	if f := until[*http2.RSTStreamFrame](p); f.StreamID != 3 || f.ErrCode != http2.ErrCodeRefusedStream {
		t.Fatalf("what comes yet is answered with %v", f)
	}
}

// So it is before a trunk that nobody uses is closed: a client whose idle time is the
// same opens a stream just then.
func TestAnIdleEndIsAnnounced(t *testing.T) {
	const idle = 200 * time.Millisecond
	r := emptyRig(t, rigConfig{server: relay.TrunkConfig{IdleAfter: idle}, serve: func(c net.Conn, _ string) { echo(c) }})
	p := r.facing(false)
	p.settle()
	if f := until[*http2.GoAwayFrame](p); f.LastStreamID != 1<<31-1 || f.ErrCode != http2.ErrCodeNo {
		t.Fatalf("the first GOAWAY is %v", f)
	}
	told := time.Now()
	p.headers(1, ":method", "CONNECT", ":authority", "10.0.0.1:80")
	if f := until[*http2.HeadersFrame](p); f.StreamID != 1 {
		t.Fatalf("the answer is %v", f)
	}
	if f := until[*http2.GoAwayFrame](p); f.LastStreamID != 1 || time.Since(told) < idle {
		t.Fatalf("the last GOAWAY is %v, %v after the first", f, time.Since(told))
	}
	p.must(p.fr.WriteData(1, true, []byte("still here")))
	if f := until[*http2.DataFrame](p); string(f.Data()) != "still here" {
		t.Fatalf("the stream answers %q", f.Data())
	}
	if e := r.trunkEnd(); !errors.Is(e.err, relay.ErrDrained) {
		t.Fatalf("the trunk ended with: %v", e.err)
	}
}

// A stream without traffic keeps its trunk, and pings keep it alive.
func TestQuietStreamKeepsItsTrunk(t *testing.T) {
	r := emptyRig(t, rigConfig{client: relay.TrunkConfig{PingAfter: 20 * time.Millisecond, DeadAfter: 10 * time.Second, IdleAfter: 400 * time.Millisecond}})
	p := r.facing(true)
	c := r.dial() // before the idle time can pass
	p.settle()
	for range 40 { // twice the idle time
		f := until[*http2.PingFrame](p)
		p.must(p.fr.WritePing(true, f.Data))
	}
	on(r.client, func() {
		if r.trunk.Closed() {
			t.Error("a trunk with a stream closed as idle")
		}
	})
	abort(c)
	if e := r.end(); e.how != relay.EndAppReset {
		t.Fatalf("end %+v", e)
	}
	if e := r.trunkEnd(); !errors.Is(e.err, relay.ErrIdle) {
		t.Fatalf("the trunk ended with: %v", e.err)
	}
}

func TestSilentPeerIsGivenUp(t *testing.T) {
	for name, cfg := range map[string]relay.TrunkConfig{
		"with pings":    {PingAfter: 100 * time.Millisecond, DeadAfter: 400 * time.Millisecond, IdleAfter: time.Hour},
		"without pings": {DeadAfter: 400 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			r := emptyRig(t, rigConfig{client: cfg})
			p := r.facing(true)
			started := time.Now() // before it can hear of us last
			p.settle()
			c := r.dial()
			if e := r.trunkEnd(); !errors.Is(e.err, relay.ErrDead) {
				t.Fatalf("the trunk ended with: %v", e.err)
			}
			if d := time.Since(started); d < 400*time.Millisecond {
				t.Fatalf("given up after %v", d)
			}
			if e := r.end(); e.how != relay.EndTrunkLost {
				t.Fatalf("end %+v", e)
			}
			if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
				t.Fatalf("the application saw %v", err)
			}
			pings := 0
			for {
				f, err := p.fr.ReadFrame()
				if err != nil {
					if !errors.Is(err, io.EOF) {
						t.Fatalf("instead of close_notify: %v", err)
					}
					break
				}
				if _, ok := f.(*http2.PingFrame); ok {
					pings++
				}
			}
			if (pings > 0) != (cfg.PingAfter > 0) {
				t.Fatalf("%d pings", pings)
			}
		})
	}
}

// A trunk that stood still itself, longer than a peer may be silent, asks before
// it gives the peer up.
func TestStandstillIsNotThePeersSilence(t *testing.T) {
	cfg := relay.TrunkConfig{PingAfter: 150 * time.Millisecond, DeadAfter: 200 * time.Millisecond}
	r := emptyRig(t, rigConfig{client: cfg})
	p := r.facing(true)
	p.settle()
	release := hold(r.client)
	<-time.After(2 * cfg.DeadAfter)
	release()
	f := until[*http2.PingFrame](p)
	p.must(p.fr.WritePing(true, f.Data))
	poll(t, "the answer", func() (answered bool) {
		on(r.client, func() { answered = !r.trunk.Pinging() })
		return answered
	})
	on(r.client, func() {
		if r.trunk.Closed() {
			t.Error("a peer that answers was given up")
		}
	})
}

// What the peer did not process goes to another trunk, with every byte that the
// application has sent meanwhile.
func TestRefusedStreamGoesToAnotherTrunk(t *testing.T) {
	for _, by := range []string{"GOAWAY", "RST_STREAM"} {
		t.Run(by, func(t *testing.T) {
			refused := make(chan *relay.Relay, 1)
			r := emptyRig(t, rigConfig{
				serve:   func(c net.Conn, _ string) { echo(c) },
				refused: func(rl *relay.Relay) { refused <- rl },
			})
			p := r.facing(true)
			p.settle()
			first := r.trunk
			c := r.dial()
			want := pattern(200_000)
			go func() { _, _ = c.Write(want); _ = c.CloseWrite() }()
			id := until[*http2.HeadersFrame](p).StreamID
			if by == "GOAWAY" {
				p.must(p.fr.WriteGoAway(0, http2.ErrCodeNo, nil))
			} else {
				p.must(p.fr.WriteRSTStream(id, http2.ErrCodeRefusedStream))
			}
			rl := receive(t, refused, "the refusal")

			r.server = r.worker()
			r.connect() // another one, of the same worker
			on(r.client, func() {
				if rl.Trunk() != nil || first.Streams() != 0 {
					t.Error("the relay is still attached")
				}
				if err := r.trunk.Open(rl, request("10.0.0.1:80")); err != nil {
					t.Error(err)
				}
			})
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes of %d came back, %v", len(got), len(want), err)
			}
			a, b := r.bothEnds()
			if a.how != relay.EndClean || b.how != relay.EndClean {
				t.Fatalf("ends %+v and %+v", a, b)
			}
			if by == "GOAWAY" {
				if e := r.trunkEnd(); !errors.Is(e.err, relay.ErrDrained) {
					t.Fatalf("the first trunk ended with: %v", e.err)
				}
			}
		})
	}
}

// A peer that has gone says why before; a write that fails comes too early to
// know.
func TestLastWordsAreReadWhenAWriteFails(t *testing.T) {
	for _, tt := range []struct {
		name string
		last func(p *peer)
		want func(error) bool
		how  relay.End
	}{
		{"alert", func(p *peer) {
			_, err := p.conn.Write(p.rc.l.AppendAlert(nil, record.AlertCertificateExpired))
			p.must(err)
		}, func(err error) bool {
			var a *record.PeerAlert
			return errors.As(err, &a) && a.Alert == record.AlertCertificateExpired
		}, relay.EndTrunkLost},
		{"goaway", func(p *peer) {
			p.must(p.fr.WriteGoAway(0, http2.ErrCodeNo, nil))
			_, err := p.conn.Write(p.rc.l.AppendAlert(nil, record.AlertCloseNotify))
			p.must(err)
		}, func(err error) bool { return errors.Is(err, relay.ErrDrained) }, relay.EndAborted}, // by Refused
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := emptyRig(t, rigConfig{})
			p := r.facing(true)
			p.settle()
			c := r.dial()
			until[*http2.HeadersFrame](p)
			// The reset comes while the loop is in a turn whose events it has
			// taken already, so that the flush is before the read.
			held, let := make(chan struct{}), make(chan struct{})
			r.client.Loop.Post(func() {
				close(held)
				<-let
				r.trunk.Session().H2.Ping([8]byte{})
				r.trunk.Send()
			})
			<-held
			tt.last(p)
			abort(p.conn)
			close(let)
			if e := r.trunkEnd(); !tt.want(e.err) {
				t.Errorf("the trunk ended with: %v", e.err)
			}
			if e := r.end(); e.how != tt.how {
				t.Errorf("end %+v", e)
			}
			if _, err := io.ReadAll(c); err == nil {
				t.Error("the application saw a clean end")
			}
		})
	}
}

// A record layer that seals nothing any more ends its trunk, and nothing else.
func TestTrunkThatCannotSealEnds(t *testing.T) {
	r := newRig(t, 2, echo)
	c := r.dial()
	exchange(t, c)
	on(r.client, func() { r.trunk.Session().Records.Close() })
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if e := r.trunkEnd(); e.side != "client" || !errors.Is(e.err, relay.ErrUnsealed) {
		t.Fatalf("the %s's trunk ended with: %v", e.side, e.err)
	}
	a, b := r.bothEnds()
	if a.how != relay.EndTrunkLost || b.how != relay.EndTrunkLost {
		t.Fatalf("ends %+v and %+v", a, b)
	}
}

// An owner may end the trunk when it is told of a relay's end, in the middle of
// a flush too.
func TestTrunkClosedWhileItIsFilled(t *testing.T) {
	var r *rig
	gone := errors.New("gone")
	r = newRigWith(t, rigConfig{loops: 2, serve: func(c net.Conn, _ string) { echo(c) }, ended: func(e end) {
		if e.side == "client" {
			r.trunk.Close(gone)
		}
	}})
	c := r.dial()
	exchange(t, c)
	release := hold(r.client)
	abort(c)
	release()
	if e := r.trunkEnd(); !errors.Is(e.err, gone) && !errors.Is(e.err, relay.ErrTruncated) {
		t.Fatalf("the %s's trunk ended with: %v", e.side, e.err)
	}
}

// Frames of no use are a matter of rate: what is too much at once is not too
// much over time.
func TestFramesOfNoUseAreARate(t *testing.T) {
	r := emptyRig(t, rigConfig{serve: func(c net.Conn, _ string) { echo(c) }})
	p := r.facing(false)
	p.settle()
	ping := func() {
		p.must(p.fr.WritePing(false, [8]byte{1}))
		for {
			if f := until[*http2.PingFrame](p); f.IsAck() {
				return
			}
		}
	}
	flood := func(n int) (err error) {
		for range n {
			if err = p.fr.WritePriority(1, http2.PriorityParam{Weight: 1}); err != nil {
				break
			}
		}
		return err
	}
	for range 5 {
		p.must(flood(600))
		ping()
		on(r.server, func() { r.far.Age(2 * time.Second) })
		ping()
	}
	// The control: no refill for an hour. (Its end may be seen while it is
	// still being written.)
	on(r.server, func() { r.far.Age(-time.Hour) })
	_ = flood(2000)
	var broken *h2.ConnError
	if e := r.trunkEnd(); !errors.As(e.err, &broken) || broken.Code != http2.ErrCodeEnhanceYourCalm {
		t.Fatalf("a flood ends with: %v", e.err)
	}
}
