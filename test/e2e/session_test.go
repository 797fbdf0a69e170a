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

	"github.com/culvert-mesh/culvert/internal/lab"
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
	userSpace(t)
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
		if err := s.returns(c, marker); err != nil { // the control
			t.Errorf("control: after the 200: %v", err)
		}
	})
}

// TestStatusOfPeer: a status that is not 200 is a reset for the application, and
// nothing of its data is sent.
func TestStatusOfPeer(t *testing.T) {
	userSpace(t)
	m := newPeerMesh(t, lab.DaemonConfig{})
	families(t, func(t *testing.T, family int) {
		m := m.in(t)
		first := m.connect(m.client, m.app(family))
		s := m.session()
		s.accepts(first, marker) // the control
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
	userSpace(t)
	m := newPeerMesh(t, lab.DaemonConfig{})
	families(t, func(t *testing.T, family int) {
		m := m.in(t)
		c1 := m.connect(m.client, m.app(family))
		s1 := m.session()
		s1.accepts(c1, "one")
		c2 := m.connect(m.client, m.app(family)) // the control: no GOAWAY yet
		last := s1.accepts(c2, "two")
		m.none()

		s1.do(func() error { return s1.fr.WriteGoAway(last, http2.ErrCodeNo, nil) })
		m.must(s1.exchange(c1, "three")) // the frame has been taken by then
		c3 := m.connect(m.client, m.app(family))
		s2 := m.session()
		s2.accepts(c3, "four")
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
	userSpace(t)
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
		if err := s2.returns(c, marker); err != nil {
			t.Errorf("on the second session: %v", err)
		}
	})
}

// TestPeerStreamLimit: a peer that takes few streams gets few; the rest go to a
// sibling.
func TestPeerStreamLimit(t *testing.T) {
	userSpace(t)
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
					s.accepts(c, marker)
				}
				m.none()
			})
		})
	}
}

// TestManyStreams: far more than a hundred streams share one handshake.
func TestManyStreams(t *testing.T) {
	userSpace(t)
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
	userSpace(t)
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
		s.accepts(c, marker)
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
	userSpace(t)
	idle := scaled(400 * time.Millisecond)
	m := newPeerMesh(t, tunnelSettings(map[string]any{"idle": idle.String()}))
	families(t, func(t *testing.T, family int) {
		m := m.in(t)
		c := m.connect(m.client, m.app(family))
		s := m.session()
		stream := s.accepts(c, marker)
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
				s.accepts(c, marker)
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
			stream := s.accepts(c, marker)
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
				"bytes_sent", "bytes_recv", "reason", "tls.version", "tls.cipher", "tls.group", "connection_security_policy", "trace",
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
