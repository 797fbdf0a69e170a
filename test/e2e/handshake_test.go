// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// TestExpiredSession: nothing new rests on a certificate whose time is over; what
// is open goes on.
func TestExpiredSession(t *testing.T) {
	userSpace(t)
	life := scaled(2500 * time.Millisecond) // to the second below
	m := newPeerMesh(t, lab.DaemonConfig{})
	app, err := m.Pod(2, 1).Echo(8080)
	m.must(err)
	served := peerTLS(m.svid(m.ca, m.impostor.Identity(), testca.ValidFor(life)))
	over := served.Certificates[0].Leaf.NotAfter
	good := m.present.Swap(served)
	from := m.Pod(1, 3)
	s, err := m.env.session(from, app.Addr(4).Addr(), peerTLS(m.svid(m.ca, from.Identity(), testca.ValidFor(life))))
	m.must(err)
	a, err := s.connect("one", app.Addr(4))
	m.must(err)
	m.must(s.expect(a.stream, "one"))
	m.carries(s, app.Addr(4)) // the control: another stream before the end

	c1 := m.connect(m.client, m.app(4))
	s1 := m.session()
	stream := s1.accepts(c1, "one")
	c2 := m.connect(m.client, m.app(4)) // the control
	s1.accepts(c2, "two")
	m.none()

	<-time.After(time.Until(over.Add(time.Second))) // the other's is not later than that
	m.present.Store(good)
	// Our client goes to a session with another certificate.
	c3 := m.connect(m.client, m.app(4))
	s2 := m.session()
	s2.accepts(c3, "three")
	m.must(s1.exchange(c1, "four"))
	s1.do(func() error { return s1.fr.WriteData(stream, true, nil) })
	m.must(c1.CloseWrite())
	m.must(c2.SetLinger(0))
	m.must(c2.Close())
	if !s1.ended(patience()) {
		t.Error("the session with the expired certificate was not closed")
	}
	m.must(s.SetDeadline(time.Now().Add(patience())))
	// Our server has said GOAWAY by itself, and refuses the stream, so that the
	// client may ask again elsewhere.
	reached := len(app.Peers())
	_, err = s.connect("two", app.Addr(4))
	if err == nil || !strings.Contains(err.Error(), "GOAWAY NO_ERROR") {
		t.Errorf("on the session of an expired client came %v, want GOAWAY", err)
	}
	if !s.announced {
		t.Error("GOAWAY was not announced")
	}
	f, err := s.frame(s.next - 2)
	if reset, ok := f.(*http2.RSTStreamFrame); !ok || reset.ErrCode != http2.ErrCodeRefusedStream {
		t.Errorf("a new stream was answered by %v, %v, want it refused", f, err)
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
	userSpace(t)
	c := newPeerCheck(t)
	c.run("")
	families(t, func(t *testing.T, family int) {
		c := c.in(t)
		claimed, other := *c.goodClient, c.svid(c.ca, c.stranger.Identity())
		claimed.Key = other.Key // not the certificate's
		reached := len(c.app.Peers())
		watch := c.watch(c.daemons[1])
		if err := c.ask(c.stranger, peerTLS(&claimed), c.app.Addr(family)); alert(err) == "" {
			t.Errorf("a client without its certificate's key heard %v, want an alert", err)
		}
		watch.failed("destination", identity.ReasonTLSProtocol, "signature")
		said, err := watch.Log()
		c.must(err)
		if strings.Contains(said, c.stranger.Identity()) {
			t.Errorf("the identity that was not proven is in the log: %s", said)
		}
		lines, err := watch.AccessLog()
		c.must(err)
		if n := len(lines); n != 0 {
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

// TestRefusalIsHeard: a client that is refused, and has said more than was read,
// hears the alert and an orderly end, which outlasts a segment that is lost. A
// reset would not.
func TestRefusalIsHeard(t *testing.T) {
	userSpace(t)
	c := newPeerCheck(t)
	c.run("")
	families(t, func(t *testing.T, family int) {
		c := c.in(t)
		expired := c.svid(c.ca, c.stranger.Identity(), testca.Change(func(x *x509.Certificate) {
			x.NotBefore, x.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}))
		resets := func(more int) int {
			wire := c.capture(capture.Config{NS: c.Nodes[1].NS, Interface: c.server.HostEnd()})
			watch := c.watch(c.daemons[1])
			raw, err := c.dial(c.stranger, netip.AddrPortFrom(c.server.Addr(family), hbonePort))
			c.must(err)
			tc := tls.Client(raw, peerTLS(expired))
			c.must(tc.Handshake()) // in TLS 1.3 its own certificate is not looked at yet
			_, _ = tc.Write(make([]byte, more))
			if _, err := io.ReadAll(tc); more < 1<<20 && alert(err) == "" {
				t.Errorf("the client heard %v, want an alert", err)
			}
			raw.Close()
			watch.failed("destination", identity.ReasonCertificateExpired, "")
			n, _ := wire.Count(func(s capture.Segment) bool { return s.Src.Port() == hbonePort && s.Has(capture.RST) })
			return n
		}
		if n := resets(20000); n != 0 {
			t.Errorf("%d resets", n)
		}
		if resets(8<<20) == 0 { // the control: more than anybody listens to
			t.Error("control: no reset")
		}
	})
}

// TestNoResumption: no ticket, no name, each handshake a whole one.
func TestNoResumption(t *testing.T) {
	userSpace(t)
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
	userSpace(t)
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
