// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// TestPlainBytesOnHBONE: what is not TLS on the tunnel's port.
func TestPlainBytesOnHBONE(t *testing.T) {
	c := newPeerCheck(t)
	c.run("")
	for _, tc := range []struct {
		name   string
		say    func(net.Conn) error
		reason identity.Reason
		answer int // bytes that may come back: an alert in a record
	}{
		{"http", func(c net.Conn) error {
			_, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: pod2-1\r\n\r\n"+marker)
			return err
		}, identity.ReasonTLSProtocol, 7},
		{"h2c", func(c net.Conn) error {
			_, err := io.WriteString(c, http2.ClientPreface+marker)
			return err
		}, identity.ReasonTLSProtocol, 7},
		{"close", func(c net.Conn) error { return c.(*net.TCPConn).CloseWrite() }, identity.ReasonTLSProtocol, 0},
		{"half_a_record", func(c net.Conn) error {
			_, err := c.Write([]byte{22, 3, 1, 1, 0, 1})
			return err
		}, identity.ReasonTimeout, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			families(t, func(t *testing.T, family int) {
				c := c.in(t)
				reached := len(c.app.Peers())
				watch := c.watch(c.daemons[1])
				wire := c.capture(capture.Config{NS: c.Nodes[1].NS, Interface: c.server.HostEnd()})
				conn := c.connect(c.stranger, netip.AddrPortFrom(c.server.Addr(family), hbonePort))
				c.must(conn.SetDeadline(time.Now().Add(patience())))
				c.must(tc.say(conn))
				b, err := io.ReadAll(conn)
				if isTimeout(err) || len(b) > tc.answer {
					t.Errorf("it was answered with %q, %v, want the connection closed", b, err)
				}
				watch.failed("destination", tc.reason, "")
				if n := len(c.app.Peers()) - reached; n != 0 {
					t.Errorf("%d connections to the application", n)
				}
				if n, _ := wire.Count(func(s capture.Segment) bool { return !s.Port(hbonePort) }); n != 0 {
					t.Errorf("%d segments on another port", n)
				}
			})
		})
	}
	t.Run("control", func(t *testing.T) {
		families(t, func(t *testing.T, family int) { c.in(t).serveClient(family, peerTLS(c.goodClient)) })
	})
}

// TestStatus: requests on a good session that are not to be carried.
func TestStatus(t *testing.T) {
	userSpace(t)
	e := setup(t)
	file := filepath.Join(e.Nodes[1].Dir, "policy.yaml")
	denied := e.Pod(1, 2)
	e.must(os.WriteFile(file, fmt.Appendf(nil, "rules:\n  - name: not-this-one\n    denySource: [%q]\n", denied.Identity()), 0o600))
	daemons := []*lab.Daemon{
		e.startOn(e.Nodes[0], lab.DaemonConfig{}),
		e.startOn(e.Nodes[1], lab.DaemonConfig{Settings: map[string]any{"policy": map[string]any{"file": file}}}),
	}
	stranger, server := e.Pod(1, 3), e.Pod(2, 1)
	ca := e.authority()
	app, err := server.Echo(8080)
	e.must(err)
	beside, err := e.Pod(2, 2).Echo(8080)
	e.must(err)

	// refused asks on a good session and wants the answer, the line in the log
	// and the metric, and then the control: the same session carries.
	refused := func(e *env, as string, family int, status int, reason, detail string, logged netip.AddrPort, request ...string) lab.Entry {
		e.t.Helper()
		reached := len(app.Peers()) + len(beside.Peers())
		s, err := e.session(stranger, server.Addr(family), peerTLS(e.svid(ca, as)))
		e.must(err)
		watch := e.watch(daemons[1])
		a, err := s.request(marker, request...)
		if err != nil || a.status != status || a.reason != reason {
			e.t.Errorf("%v: status %d (%s), %v, want %d (%s)", request, a.status, a.reason, err, status, reason)
		}
		l := watch.closed("inbound", logged)
		if l.String("reason") != reason || !strings.Contains(l.String("detail"), detail) {
			e.t.Errorf("%v: access log: reason %q, detail %q, want %q, %q", request, l.String("reason"), l.String("detail"), reason, detail)
		}
		if l.String("src.identity") != as {
			e.t.Errorf("%v: access log: src.identity %q, want %q", request, l.String("src.identity"), as)
		}
		m, err := daemons[1].Metrics(e.ctx)
		e.must(err)
		counted := func(m lab.Metrics) float64 {
			return m.Sum("culvert_connections_closed_total", "reporter", "destination", "reason", reason)
		}
		if n := counted(m) - counted(watch.before); n != 1 {
			e.t.Errorf("%v: %v connections are counted as %s, want 1", request, n, reason)
		}
		if n := len(app.Peers()) + len(beside.Peers()) - reached; n != 0 {
			e.t.Errorf("%v: %d connections to an application", request, n)
		}
		if as == denied.Identity() {
			return l
		}
		e.carries(s, app.Addr(family))
		return l
	}
	local := func(family int) netip.AddrPort { return netip.AddrPortFrom(server.Addr(family), hbonePort) }
	connect := func(authority string) []string { return []string{":method", "CONNECT", ":authority", authority} }

	t.Run("not_connect", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			for _, method := range []string{"GET", "POST", "connect"} {
				refused(e.in(t), stranger.Identity(), family, 400, "refused", "CONNECT", local(family),
					":method", method, ":scheme", "https", ":path", "/", ":authority", app.Addr(family).String())
			}
		})
	})
	t.Run("extended_connect", func(t *testing.T) { // RFC 8441, which we do not announce: the request is malformed
		families(t, func(t *testing.T, family int) {
			e := e.in(t)
			reached := len(app.Peers())
			s, err := e.session(stranger, server.Addr(family), peerTLS(e.svid(ca, stranger.Identity())))
			e.must(err)
			to := app.Addr(family)
			a, err := s.request(marker, ":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":path", "/", ":authority", to.String())
			if err == nil || !strings.Contains(err.Error(), "RST_STREAM") {
				t.Errorf("status %d, %v, want the stream reset", a.status, err)
			}
			if n := len(app.Peers()) - reached; n != 0 {
				t.Errorf("%d connections to the application", n)
			}
			e.carries(s, to)
		})
	})
	t.Run("bad_authority", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			ip := server.Addr(family).String()
			if family == 6 {
				ip = "[" + ip + "]"
			}
			for _, authority := range []string{"pod2-1.demo.svc:8080", ip, ip + ":", ip + ":0", ip + ":65536", ip + ":+8080", "user@" + ip + ":8080", "[::ffff:" + server.Addr(4).String() + "]:8080", "*"} {
				refused(e.in(t), stranger.Identity(), family, 400, "refused", "authority", local(family), connect(authority)...)
			}
			refused(e.in(t), stranger.Identity(), family, 400, "refused", "authority", local(family), ":method", "CONNECT")
		})
	})
	t.Run("other_address", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			loopback := netip.MustParseAddr("127.0.0.1")
			if family == 6 {
				loopback = netip.IPv6Loopback()
			}
			for _, a := range []netip.Addr{beside.Pod.Addr(family), server.Addr(10 - family), loopback, e.Nodes[1].Addrs[0]} {
				to := netip.AddrPortFrom(a, 8080)
				refused(e.in(t), stranger.Identity(), family, 400, "refused", "not the address connected to", to, connect(to.String())...)
			}
		})
	})
	t.Run("own_port", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			for _, port := range []uint16{15001, 15006, 15008, 15020, 15021} {
				to := netip.AddrPortFrom(server.Addr(family), port)
				refused(e.in(t), stranger.Identity(), family, 503, "refused", "the tunnel's own", to, connect(to.String())...)
			}
		})
	})
	t.Run("refused", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			to := netip.AddrPortFrom(server.Addr(family), 9)
			refused(e.in(t), stranger.Identity(), family, 503, "refused", "connection refused", to, connect(to.String())...)
		})
	})
	t.Run("denied", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			l := refused(e.in(t), denied.Identity(), family, 401, "denied", "not-this-one", app.Addr(family), connect(app.Addr(family).String())...)
			if l.String("policy.rule") != "not-this-one" || l.String("policy.version") == "" {
				t.Errorf("access log: rule %q, version %q", l.String("policy.rule"), l.String("policy.version"))
			}
			// And by the daemon of the pod that is denied.
			e := e.in(t)
			reached := len(app.Peers())
			watch1, watch2 := e.watch(daemons[0]), e.watch(daemons[1])
			if err := e.try(denied, app.Addr(family)); !isReset(err) {
				t.Errorf("the application saw %v, want a reset", err)
			}
			if l := watch2.closed("inbound", app.Addr(family)); l.String("reason") != "denied" || l.String("policy.rule") != "not-this-one" || l.String("src.identity") != denied.Identity() {
				t.Errorf("access log of the destination: %v", l)
			}
			if l := watch1.closed("outbound", app.Addr(family)); l.String("reason") != "denied_by_peer" || !strings.Contains(l.String("detail"), "401") {
				t.Errorf("access log of the source: reason %q, detail %q", l.String("reason"), l.String("detail"))
			}
			if n := len(app.Peers()) - reached; n != 0 {
				t.Errorf("%d connections to the application", n)
			}
			// The controls: another identity, and another destination.
			e.must(e.try(e.Pod(1, 1), app.Addr(family)))
			e.must(e.try(denied, sameNode(e, family)))
		})
	})
}

// carries is the control of a refusal: a good request on the same session.
func (e *env) carries(s *peerSession, to netip.AddrPort) {
	e.t.Helper()
	if _, err := s.carry(to); err != nil {
		e.t.Errorf("control: a good request on the same session: %v", err)
	}
}

// sameNode is an echo server on the first node, which has no rule.
func sameNode(e *env, family int) netip.AddrPort {
	e.t.Helper()
	app, err := e.Pod(1, 1).Echo(0)
	e.must(err)
	return app.Addr(family)
}

// TestForwardedIsNotTrusted: what a peer says of its client is information.
func TestForwardedIsNotTrusted(t *testing.T) {
	userSpace(t)
	e, daemons := mesh(t)
	stranger, server := e.Pod(1, 3), e.Pod(2, 1)
	app, err := server.Echo(8080)
	e.must(err)
	beside, err := e.Pod(2, 2).Echo(8080)
	e.must(err)
	svid := e.svid(e.authority(), stranger.Identity())
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		s, err := e.session(stranger, server.Addr(family), peerTLS(svid))
		e.must(err)
		// Its own address and a port: only that port is taken, for the log.
		own := netip.AddrPortFrom(stranger.Addr(family), 4711)
		for _, forwarded := range []string{
			`for="` + netip.AddrPortFrom(e.Pod(1, 1).Addr(family), 4711).String() + `"`, // a neighbour's
			`for="` + netip.AddrPortFrom(server.Addr(family), 4711).String() + `"`,      // the destination's own
			`for="` + beside.Addr(family).String() + `";host="` + beside.Addr(family).String() + `"`,
			`for="127.0.0.1:22"`, `for=unknown`, `for="_hidden"`, strings.Repeat("x", 2000),
			`for="` + own.String() + `"`,
		} {
			watch := e.watch(daemons[1])
			reached := len(app.Peers())
			stream, err := s.carry(app.Addr(family), "forwarded", forwarded)
			if err != nil {
				t.Fatalf("forwarded %.40q: %v", forwarded, err)
			}
			peers := app.Peers()
			if len(peers) != reached+1 || peers[reached].Addr() != stranger.Addr(family) {
				t.Errorf("forwarded %.40q: the application's peer is %v, want %s", forwarded, peers[reached:], stranger.Addr(family))
			}
			e.must(s.WriteRSTStream(stream, http2.ErrCodeCancel))
			l := watch.closed("inbound", app.Addr(family))
			if src := l.String("src.addr"); !strings.HasPrefix(src, addrPrefix(stranger.Addr(family))) {
				t.Errorf("forwarded %.40q: access log: src.addr is %s, want %s", forwarded, src, stranger.Addr(family))
			} else if strings.HasSuffix(src, ":4711") != strings.Contains(forwarded, own.String()) {
				t.Errorf("forwarded %.40q: access log: src.addr is %s", forwarded, src)
			}
			if l.String("src.identity") != stranger.Identity() {
				t.Errorf("forwarded %.40q: access log: src.identity is %q", forwarded, l.String("src.identity"))
			}
		}
		if n := len(beside.Peers()); n != 0 {
			t.Errorf("%d connections to the address that was forwarded", n)
		}
	})
}
