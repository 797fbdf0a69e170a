// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// quiet is how long a test waits for something that must not come.
const quiet = 200 * time.Millisecond

// app is where the impostor's application would be.
func (m *peerMesh) app(family int) netip.AddrPort {
	return netip.AddrPortFrom(m.impostor.Addr(family), 8080)
}

// tunnelSettings are the daemons' with these times of the tunnel.
func tunnelSettings(times map[string]any) lab.DaemonConfig {
	return lab.DaemonConfig{Settings: map[string]any{"tunnel": times}}
}

// TestNoEarlyData: what the application says waits for the 200.
func TestNoEarlyData(t *testing.T) {
	m := newPeerMesh(t, lab.DaemonConfig{})
	families(t, func(t *testing.T, family int) {
		m := m.in(t)
		c := m.connect(m.client, m.app(family))
		_, err := io.WriteString(c, marker)
		m.must(err)
		s := m.session()
		stream := s.request()
		if x, ok := s.within(http2.FrameData, quiet); ok {
			t.Errorf("%q came before the 200", x.data)
		}
		s.respond(stream, "200", false)
		if got := s.echo(); got != marker { // the control
			t.Errorf("control: %q came after the 200", got)
		}
		got := make([]byte, len(marker))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != marker {
			t.Errorf("control: %q came back, %v", got, err)
		}
	})
}

// TestStatusOfPeer: a status that is not 200 is a reset for the application, and
// nothing of its data is sent.
func TestStatusOfPeer(t *testing.T) {
	m := newPeerMesh(t, lab.DaemonConfig{})
	families(t, func(t *testing.T, family int) {
		m := m.in(t)
		first := m.connect(m.client, m.app(family))
		s := m.session()
		s.respond(s.request(), "200", false)
		m.must(s.exchange(first, marker)) // the control
		for status, reason := range map[string]string{"400": "refused", "401": "denied_by_peer", "403": "denied_by_peer", "404": "unreachable", "503": "unreachable", "204": "unreachable", "302": "unreachable"} {
			watch := m.watch(m.daemons[0])
			c := m.connect(m.client, m.app(family))
			_, err := io.WriteString(c, marker)
			m.must(err)
			s.respond(s.request(), status, true)
			if _, err := c.Read(make([]byte, 1)); !isReset(err) {
				t.Errorf("%s: the application saw %v, want a reset", status, err)
			}
			l := watch.closed("outbound", m.app(family))
			if l.String("reason") != reason || !strings.Contains(l.String("detail"), status) {
				t.Errorf("%s: access log: reason %q, detail %q, want %q", status, l.String("reason"), l.String("detail"), reason)
			}
			if x, ok := s.within(http2.FrameData, quiet/4); ok {
				t.Errorf("%s: %q was sent", status, x.data)
			}
		}
		m.must(s.exchange(first, marker)) // the session goes on
	})
}

// TestGoAway: a session that the peer drains takes nothing new, and its streams
// go on.
func TestGoAway(t *testing.T) {
	m := newPeerMesh(t, lab.DaemonConfig{})
	families(t, func(t *testing.T, family int) {
		m := m.in(t)
		c1 := m.connect(m.client, m.app(family))
		s1 := m.session()
		stream := s1.request()
		s1.respond(stream, "200", false)
		m.must(s1.exchange(c1, "one"))
		c2 := m.connect(m.client, m.app(family)) // the control: no GOAWAY yet
		last := s1.request()
		s1.respond(last, "200", false)
		m.must(s1.exchange(c2, "two"))
		m.none()

		s1.do(func() error { return s1.fr.WriteGoAway(last, http2.ErrCodeNo, nil) })
		m.must(s1.exchange(c1, "three")) // the frame has been taken by then
		c3 := m.connect(m.client, m.app(family))
		s2 := m.session()
		s2.respond(s2.request(), "200", false)
		m.must(s2.exchange(c3, "four"))
		m.must(s1.exchange(c1, "five"))
		for _, c := range []*net.TCPConn{c1, c2} {
			m.must(c.CloseWrite())
			x := s1.next(http2.FrameData)
			s1.do(func() error { return s1.fr.WriteData(x.StreamID, true, nil) })
			_, err := io.ReadAll(c)
			m.must(err)
		}
		if !s1.ended(patience()) {
			t.Error("the drained session was not closed")
		}
		m.must(s2.exchange(c3, "six"))
	})
}

// TestGoAwayOfUnprocessed: streams above the last one named were not processed,
// and are tried on another session.
func TestGoAwayOfUnprocessed(t *testing.T) {
	m := newPeerMesh(t, lab.DaemonConfig{})
	families(t, func(t *testing.T, family int) {
		m := m.in(t)
		c := m.connect(m.client, m.app(family))
		_, err := io.WriteString(c, marker)
		m.must(err)
		s1 := m.session()
		s1.request()
		s1.do(func() error { return s1.fr.WriteGoAway(0, http2.ErrCodeNo, nil) })
		s2 := m.session()
		s2.respond(s2.request(), "200", false)
		if got := s2.echo(); got != marker {
			t.Errorf("%q came on the second session", got)
		}
		got := make([]byte, len(marker))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != marker {
			t.Errorf("%q came back, %v", got, err)
		}
	})
}

// TestPeerStreamLimit: a peer that takes few streams gets few; the rest go to a
// sibling.
func TestPeerStreamLimit(t *testing.T) {
	for _, limit := range []uint32{2, 100} {
		t.Run(strconv.Itoa(int(limit)), func(t *testing.T) {
			m := newPeerMesh(t, lab.DaemonConfig{}, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: limit})
			families(t, func(t *testing.T, family int) {
				m := m.in(t)
				var s *framed
				for i := range 3 {
					c := m.connect(m.client, m.app(family))
					if i == 0 || i == int(limit) {
						s = m.session()
					}
					s.respond(s.request(), "200", false)
					m.must(s.exchange(c, marker))
				}
				m.none()
			})
		})
	}
}

// TestManyStreams: far more than a hundred streams share one handshake.
func TestManyStreams(t *testing.T) {
	m, d := mesh(t)
	app, err := m.Pod(2, 1).Echo(8080)
	m.must(err)
	families(t, func(t *testing.T, family int) {
		e := m.in(t)
		before := e.sum(d[0], successes)
		var conns []*net.TCPConn
		for range 150 {
			c := e.connect(e.Pod(1, 1), app.Addr(family))
			e.must(exchange(c, "held"))
			conns = append(conns, c)
		}
		for _, c := range conns {
			e.must(exchange(c, marker))
		}
		if n := e.sum(d[0], successes) - before; n != 1 {
			t.Errorf("%v handshakes for 150 connections at once, want 1", n)
		}
	})
}

// TestOneDial: connections that come while a session is being opened wait for
// it.
func TestOneDial(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		before := e.sum(d[0], successes)
		start := make(chan struct{})
		var all sync.WaitGroup
		errs := make(chan error, 40)
		for i := range 40 {
			from := e.Pod(1, 1+i%2) // two keys
			all.Go(func() {
				<-start
				c, err := e.dial(from, app.Addr(family))
				if err == nil {
					err = exchange(c, marker)
				}
				errs <- err
			})
		}
		close(start)
		all.Wait()
		for range 40 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if n := e.sum(d[0], successes) - before; n != 2 {
			t.Errorf("%v handshakes for 40 first connections of two identities, want 2", n)
		}
	})
}

// TestDeadPeer: a peer that says nothing any more is asked, and given up.
func TestDeadPeer(t *testing.T) {
	after, dead := scaled(200*time.Millisecond), scaled(600*time.Millisecond)
	m := newPeerMesh(t, tunnelSettings(map[string]any{"pingAfter": after.String(), "deadAfter": dead.String()}))
	families(t, func(t *testing.T, family int) {
		m := m.in(t)
		c := m.connect(m.client, m.app(family))
		s := m.session()
		s.respond(s.request(), "200", false)
		m.must(s.exchange(c, marker))
		// The control: one that answers is kept, for longer than that.
		for start := time.Now(); time.Since(start) < dead+2*after; {
			s.next(http2.FramePing)
		}
		m.must(s.exchange(c, marker))

		watch := m.watch(m.daemons[0])
		s.do(func() error { s.deaf = true; return nil })
		start := time.Now()
		s.next(http2.FramePing)
		if _, err := io.ReadAll(c); !isReset(err) {
			t.Errorf("the application saw %v, want a reset", err)
		}
		if took := time.Since(start); took > dead+after {
			t.Errorf("given up after %v, want %v", took, dead)
		}
		if l := watch.closed("outbound", m.app(family)); l.String("reason") != "tunnel_lost" || !strings.Contains(l.String("detail"), "does not answer") {
			t.Errorf("access log: reason %q, detail %q", l.String("reason"), l.String("detail"))
		}
	})
}

// TestIdleSession: a session without streams is closed in good order.
func TestIdleSession(t *testing.T) {
	idle := scaled(400 * time.Millisecond)
	m := newPeerMesh(t, tunnelSettings(map[string]any{"idle": idle.String()}))
	families(t, func(t *testing.T, family int) {
		m := m.in(t)
		c := m.connect(m.client, m.app(family))
		s := m.session()
		stream := s.request()
		s.respond(stream, "200", false)
		m.must(s.exchange(c, marker))
		if _, ok := s.within(http2.FrameGoAway, 2*idle); ok { // the control
			t.Error("control: a session with a stream was closed")
		}
		m.must(s.exchange(c, marker))
		m.must(c.CloseWrite())
		s.next(http2.FrameData)
		s.do(func() error { return s.fr.WriteData(stream, true, nil) })
		if x := s.next(http2.FrameGoAway); x.code != http2.ErrCodeNo {
			t.Errorf("GOAWAY with %v", x.code)
		}
		if !s.ended(patience()) {
			t.Error("the session was not closed")
		}
	})
}

// TestTunnelLost: a session that ends under its streams is a reset for both
// applications, never an end that looks clean.
func TestTunnelLost(t *testing.T) {
	how := map[string]func(*tls.Conn, *net.TCPConn){
		"fin":          func(_ *tls.Conn, raw *net.TCPConn) { _ = raw.CloseWrite() },
		"rst":          func(_ *tls.Conn, raw *net.TCPConn) { _ = raw.SetLinger(0); raw.Close() },
		"close_notify": func(c *tls.Conn, _ *net.TCPConn) { _ = c.CloseWrite() },
	}
	m := newPeerMesh(t, lab.DaemonConfig{})
	ended := make(chan error, 1)
	app, err := m.Pod(2, 1).Serve(8080, func(c *net.TCPConn) {
		_, _ = io.CopyN(c, c, int64(len(marker)))
		_, err := io.ReadAll(c)
		ended <- err
	})
	m.must(err)
	for name, end := range how {
		t.Run(name, func(t *testing.T) {
			families(t, func(t *testing.T, family int) {
				m := m.in(t)
				// The client's application, when the server's end goes.
				c := m.connect(m.client, m.app(family))
				s := m.session()
				s.respond(s.request(), "200", false)
				m.must(s.exchange(c, marker))
				watch := m.watch(m.daemons[0])
				end(s.conn, s.raw)
				if _, err := io.ReadAll(c); !isReset(err) {
					t.Errorf("the client saw %v, want a reset", err)
				}
				if l := watch.closed("outbound", m.app(family)); l.String("reason") != "tunnel_lost" {
					t.Errorf("access log: reason %q, detail %q", l.String("reason"), l.String("detail"))
				}
				// The server's, when the client's end goes.
				p, err := m.env.session(m.Pod(1, 3), app.Addr(family).Addr(), peerTLS(m.svid(m.ca, m.Pod(1, 3).Identity())))
				m.must(err)
				m.carries(p, app.Addr(family))
				watch = m.watch(m.daemons[1])
				end(p.Conn, p.NetConn().(*net.TCPConn))
				if err := <-ended; !isReset(err) {
					t.Errorf("the server saw %v, want a reset", err)
				}
				if l := watch.closed("inbound", app.Addr(family)); l.String("reason") != "tunnel_lost" {
					t.Errorf("access log: reason %q, detail %q", l.String("reason"), l.String("detail"))
				}
			})
		})
	}
	t.Run("control", func(t *testing.T) { // END_STREAM first
		families(t, func(t *testing.T, family int) {
			m := m.in(t)
			c := m.connect(m.client, m.app(family))
			s := m.session()
			stream := s.request()
			s.respond(stream, "200", false)
			m.must(s.exchange(c, marker))
			s.do(func() error { return s.fr.WriteData(stream, true, nil) })
			if _, err := io.ReadAll(c); err != nil {
				t.Errorf("control: the client saw %v, want the end", err)
			}
			p, err := m.env.session(m.Pod(1, 3), app.Addr(family).Addr(), peerTLS(m.svid(m.ca, m.Pod(1, 3).Identity())))
			m.must(err)
			m.carries(p, app.Addr(family))
			m.must(p.WriteData(1, true, nil))
			if err := <-ended; err != nil {
				t.Errorf("control: the server saw %v, want the end", err)
			}
		})
	})
}

// TestExpiredSession: nothing new rests on a certificate whose time is over; what
// is open goes on.
func TestExpiredSession(t *testing.T) {
	life := scaled(2500 * time.Millisecond) // to the second below
	m := newPeerMesh(t, lab.DaemonConfig{})
	app, err := m.Pod(2, 1).Echo(8080)
	m.must(err)
	served := peerTLS(m.svid(m.ca, m.impostor.Identity(), testca.ValidFor(life)))
	over := served.Certificates[0].Leaf.NotAfter
	good := m.present
	m.present = func() *tls.Config {
		if time.Now().Before(over) {
			return served
		}
		return good()
	}
	from := m.Pod(1, 3)
	s, err := m.env.session(from, app.Addr(4).Addr(), peerTLS(m.svid(m.ca, from.Identity(), testca.ValidFor(life))))
	m.must(err)
	a, err := s.connect("one", app.Addr(4))
	m.must(err)
	m.must(s.expect(a.stream, "one"))
	m.carries(s, app.Addr(4)) // the control: another stream before the end

	c1 := m.connect(m.client, m.app(4))
	s1 := m.session()
	stream := s1.request()
	s1.respond(stream, "200", false)
	m.must(s1.exchange(c1, "one"))
	c2 := m.connect(m.client, m.app(4)) // the control
	s1.respond(s1.request(), "200", false)
	m.must(s1.exchange(c2, "two"))
	m.none()

	<-time.After(time.Until(over.Add(time.Second))) // the other's is not later than that
	// Our client goes to a session with another certificate.
	c3 := m.connect(m.client, m.app(4))
	s2 := m.session()
	s2.respond(s2.request(), "200", false)
	m.must(s2.exchange(c3, "three"))
	m.must(s1.exchange(c1, "four"))
	s1.do(func() error { return s1.fr.WriteData(stream, true, nil) })
	m.must(c1.CloseWrite())
	m.must(c2.SetLinger(0))
	m.must(c2.Close())
	if !s1.ended(patience()) {
		t.Error("the session with the expired certificate was not closed")
	}
	m.must(s.SetDeadline(time.Now().Add(patience())))
	// Our server refuses the stream, so that the client may ask again elsewhere.
	reached := len(app.Peers())
	_, err = s.connect("two", app.Addr(4))
	if err == nil || !strings.Contains(err.Error(), "RST_STREAM") {
		t.Errorf("a new stream on the session of an expired client: %v, want it reset", err)
	}
	if _, err = s.frame(a.stream); err == nil || !strings.Contains(err.Error(), "GOAWAY NO_ERROR") {
		t.Errorf("behind the reset came %v, want GOAWAY", err)
	}
	m.must(s.WriteData(a.stream, false, []byte("five")))
	m.must(s.expect(a.stream, "five"))
	if n := len(app.Peers()) - reached; n != 0 {
		t.Errorf("%d connections to the application", n)
	}
}

// TestNoIdentityBeforeHandshake: who a peer says that it is stands in no line of
// the access log and is not let in, as long as it has not proven it.
func TestNoIdentityBeforeHandshake(t *testing.T) {
	c := newPeerCheck(t)
	c.run("")
	families(t, func(t *testing.T, family int) {
		c := c.in(t)
		claimed, other := *c.goodClient, c.svid(c.ca, c.stranger.Identity())
		claimed.Key = other.Key // not the certificate's
		reached := len(c.app.Peers())
		watch := c.watch(c.daemons[1])
		if err := c.ask(c.stranger, peerTLS(&claimed), c.app.Addr(family), marker); alert(err) == "" {
			t.Errorf("a client without its certificate's key heard %v, want an alert", err)
		}
		watch.failed("destination", identity.ReasonTLSProtocol, "signature")
		log, err := os.ReadFile(c.daemons[1].LogFile)
		c.must(err)
		if said := string(log[watch.log:]); strings.Contains(said, c.stranger.Identity()) {
			t.Errorf("the identity that was not proven is in the log: %s", said)
		}
		all, err := c.daemons[1].AccessLog()
		c.must(err)
		if n := len(all) - watch.access; n != 0 {
			t.Errorf("%d lines in the access log", n)
		}
		if n := len(c.app.Peers()) - reached; n != 0 {
			t.Errorf("%d connections to the application", n)
		}
		c.serveClient(family, peerTLS(c.goodClient)) // the control
		if l := watch.closed("inbound", c.app.Addr(family)); l.String("src.identity") != c.stranger.Identity() {
			t.Errorf("control: access log: src.identity is %q", l.String("src.identity"))
		}
	})
}

// TestNoResumption: no ticket, no name, each handshake a whole one.
func TestNoResumption(t *testing.T) {
	c := newPeerCheck(t)
	c.run("")
	cache := new(tickets)
	resuming := func(tc *tls.Config) { tc.ClientSessionCache, tc.ServerName = cache, "anything" }
	// Our server gives out no ticket.
	for range 2 {
		s, err := c.session(c.stranger, c.server.V4, peerTLS(c.goodClient, resuming))
		c.must(err)
		c.carries(s, c.app.Addr(4)) // reads what comes behind the handshake
		if s.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		s.NetConn().Close()
	}
	if n := cache.count(); n != 0 {
		t.Errorf("our server gave out %d tickets", n)
	}
	// Our client names nobody, and offers no ticket.
	hellos := make(chan *tls.ClientHelloInfo, 8)
	states := make(chan tls.ConnectionState, 8)
	generous := peerTLS(c.goodID, func(tc *tls.Config) {
		tc.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) { hellos <- h; return nil, nil }
		tc.VerifyConnection = func(s tls.ConnectionState) error { states <- s; return nil }
	})
	const pskExtension = 41 // RFC 8446, section 4.2
	for range 2 {
		c.serveServer(4, generous)
		if h, s := <-hellos, <-states; h.ServerName != "" || s.ServerName != "" || s.DidResume {
			t.Errorf("our client named %q, resumed: %v", h.ServerName, s.DidResume)
		} else {
			for _, x := range h.Extensions {
				if x == pskExtension {
					t.Error("our client offers a ticket")
				}
			}
		}
	}
	// The control: the same client and the same server with each other.
	for i := range 2 {
		c.listener.serve(generous)
		raw, err := c.dial(c.stranger, netip.AddrPortFrom(c.impostor.V4, hbonePort))
		c.must(err)
		tc := tls.Client(raw, peerTLS(c.goodClient, resuming))
		c.must(tc.Handshake())
		fr := http2.NewFramer(tc, tc)
		_, err = io.WriteString(tc, http2.ClientPreface)
		c.must(err)
		c.must(fr.WriteSettings())
		_, err = fr.ReadFrame() // the ticket came before it
		c.must(err)
		if got := tc.ConnectionState().DidResume; got != (i == 1) {
			t.Errorf("control: connection %d resumed: %v", i, got)
		}
		if h := <-hellos; h.ServerName != "anything" {
			t.Errorf("control: the client named %q", h.ServerName)
		}
		<-states
		tc.Close()
		c.heard()
	}
	if cache.count() == 0 {
		t.Error("control: no ticket was seen")
	}
}

// tickets is a client's cache that counts.
type tickets struct {
	mu  sync.Mutex // guards all
	n   int
	got *tls.ClientSessionState
}

func (c *tickets) Get(string) (*tls.ClientSessionState, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.got, c.got != nil
}

func (c *tickets) Put(_ string, s *tls.ClientSessionState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s != nil {
		c.n++
	}
	c.got = s
}

func (c *tickets) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// TestKeyExchange: a hybrid one where the peer has it.
func TestKeyExchange(t *testing.T) {
	c := newPeerCheck(t)
	c.run("")
	for _, tc := range []struct {
		group tls.CurveID
		offer []tls.CurveID // nil: all
	}{{tls.X25519MLKEM768, nil}, {tls.X25519, []tls.CurveID{tls.X25519}}} {
		only := func(cfg *tls.Config) { cfg.CurvePreferences = tc.offer }
		watch := c.watch(c.daemons[1])
		c.serveClient(4, peerTLS(c.goodClient, only))
		if got := watch.closed("inbound", c.app.Addr(4)).String("tls.group"); got != tc.group.String() {
			t.Errorf("our server and a client of %v: %s, want %v", tc.offer, got, tc.group)
		}
		watch = c.watch(c.daemons[0])
		c.serveServer(4, peerTLS(c.goodID, only))
		if got := watch.closed("outbound", c.plain.Addr(4)).String("tls.group"); got != tc.group.String() {
			t.Errorf("our client and a server of %v: %s, want %v", tc.offer, got, tc.group)
		}
	}
}

// TestAccessLogsAgree: both ends of a connection write the same.
func TestAccessLogsAgree(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	families(t, func(t *testing.T, family int) {
		for _, n := range []int{1000, 1001} { // the control: one byte more
			e := e.in(t)
			out, in := e.watch(d[0]), e.watch(d[1])
			c := e.connect(e.Pod(1, 1), app.Addr(family))
			src := c.LocalAddr().String()
			e.must(exchange(c, strings.Repeat("x", n)))
			e.must(c.CloseWrite())
			_, err := io.ReadAll(c)
			e.must(err)
			source, destination := out.closed("outbound", app.Addr(family)), in.closed("inbound", app.Addr(family))
			for _, field := range []string{
				"src.addr", "src.workload", "src.namespace", "src.identity", "dst.addr", "dst.workload", "dst.namespace", "dst.identity",
				"bytes_sent", "bytes_recv", "reason", "tls.version", "tls.cipher", "tls.group", "security_policy",
			} {
				if a, b := source.String(field), destination.String(field); a != b || a == "" {
					t.Errorf("%s: the source writes %q, the destination %q", field, a, b)
				}
			}
			for field, want := range map[string]string{"src.addr": src, "bytes_sent": strconv.Itoa(n), "bytes_recv": strconv.Itoa(n), "reason": "ok"} {
				if got := source.String(field); got != want {
					t.Errorf("%s is %q, want %q", field, got, want)
				}
			}
		}
	})
}

// TestSocketsAreNonBlocking: os.File.Fd makes a shared description blocking, and
// an event loop that blocks stalls everybody.
func TestSocketsAreNonBlocking(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	for _, family := range []int{4, 6} {
		e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(family)), marker)) // and is held
	}
	const nonBlocking = 0o4000
	for _, daemon := range d {
		proc := fmt.Sprintf("/proc/%d", daemon.PID())
		fds, err := os.ReadDir(proc + "/fd")
		e.must(err)
		sockets, files := 0, 0
		for _, fd := range fds {
			what, err := os.Readlink(proc + "/fd/" + fd.Name())
			info, ierr := os.ReadFile(proc + "/fdinfo/" + fd.Name())
			if errors.Join(err, ierr) != nil {
				continue // closed meanwhile
			}
			var flags int64
			for l := range strings.Lines(string(info)) {
				if v, ok := strings.CutPrefix(l, "flags:"); ok {
					flags, err = strconv.ParseInt(strings.TrimSpace(v), 8, 64)
					e.must(err)
				}
			}
			switch blocking := flags&nonBlocking == 0; {
			case strings.HasPrefix(what, "socket:"):
				sockets++
				if blocking {
					t.Errorf("%s: descriptor %s, a socket, blocks", daemon.Node.Name, fd.Name())
				}
			case blocking:
				files++
			}
		}
		if sockets < 8 || files == 0 { // the control
			t.Errorf("control: %d sockets and %d blocking files were looked at", sockets, files)
		}
	}
}
