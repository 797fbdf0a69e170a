// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// marker is what a client sends and nobody else: it must not be on the wire.
const marker = "MARKER-4b1d-of-the-client"

// carried asserts that an exchange from client to app crosses the tunnel and
// nothing else, with the same exchange before the mesh as the control.
func carried(t *testing.T, client, server func(*env) *lab.Pod, addr func(netip.AddrPort) netip.AddrPort, family int) {
	e := setup(t)
	from, to := client(e), server(e)
	app, err := to.Echo(8080)
	e.must(err)
	dst := app.Addr(family)
	dial := dst
	if addr != nil {
		dial = addr(dst)
	}
	where := capture.Config{NS: from.Node.NS, Interface: from.HostEnd(), Markers: []string{marker}}

	// The control: without the mesh the same capture sees it all.
	control := e.capture(where)
	e.must(exchange(e.connect(from, dial), marker))
	if n := outside(control); n == 0 {
		t.Error("control: the capture saw no payload outside the tunnel with the mesh off")
	}
	if n := control.Seen(0); n == 0 {
		t.Error("control: the capture did not see the marker with the mesh off")
	}

	daemons := e.start(lab.DaemonConfig{})
	wire := e.capture(where)
	c := e.connect(from, dial)
	e.must(exchange(c, marker))
	if got := lab.Peer(c); got != dst {
		t.Errorf("the client's peer is %s, want %s", got, dst)
	}
	c.Close()
	peers := app.Peers()
	if got := peers[len(peers)-1].Addr(); got != from.Addr(family) {
		t.Errorf("the server's peer is %s, want the client's address %s", got, from.Addr(family))
	}
	if n := outside(wire); n != 0 {
		t.Errorf("%d payload-bearing segments outside the tunnel", n)
	}
	if n := wire.Seen(0); n != 0 {
		t.Errorf("the marker is on the wire %d times", n)
	}
	if b := inside(wire); b < int64(2*len(marker)) {
		t.Errorf("%d bytes in the tunnel, want more than were sent", b)
	}
	out := e.line(daemons[from.Node.Number-1], "outbound", dst)
	in := e.line(daemons[to.Node.Number-1], "inbound", dst)
	for _, l := range []lab.Entry{out, in} {
		for field, want := range map[string]string{
			"src.identity": from.Identity(), "dst.identity": to.Identity(), "reason": "ok",
			"src.workload": from.Name, "dst.workload": to.Name, "tls.version": "1.3", "connection_security_policy": "mutual_tls",
			"bytes_recv": fmt.Sprint(len(marker)), "bytes_sent": fmt.Sprint(len(marker)),
		} {
			if got := l.String(field); !strings.Contains(got, want) {
				t.Errorf("%s log: %s is %q, want %q", l.String("direction"), field, got, want)
			}
		}
		if !strings.HasPrefix(l.String("src.addr"), addrPrefix(from.Addr(family))) {
			t.Errorf("%s log: src.addr is %q, want the client's, %s", l.String("direction"), l.String("src.addr"), from.Addr(family))
		}
	}
}

func addrPrefix(a netip.Addr) string {
	if a.Is6() {
		return "[" + a.String() + "]:"
	}
	return a.String() + ":"
}

func pod(node, n int) func(*env) *lab.Pod { return func(e *env) *lab.Pod { return e.Pod(node, n) } }

func TestTwoNodes(t *testing.T) {
	families(t, func(t *testing.T, family int) { carried(t, pod(1, 1), pod(2, 1), nil, family) })
	t.Run("mapped", func(t *testing.T) {
		carried(t, pod(1, 1), pod(2, 1), func(a netip.AddrPort) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
		}, 4)
	})
}

func TestSameNode(t *testing.T) {
	families(t, func(t *testing.T, family int) { carried(t, pod(1, 1), pod(1, 2), nil, family) })
}

func TestServerSpeaksFirst(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, _ := mesh(t)
		app, err := e.Pod(2, 1).Greet(2525, "mail")
		e.must(err)
		wire := e.wire("220 mail")
		r := bufio.NewReader(e.connect(e.Pod(1, 1), app.Addr(family)))
		line, err := r.ReadString('\n')
		e.must(err)
		if want := e.Pod(1, 1).Addr(family).String(); !strings.Contains(line, want) {
			t.Errorf("greeting %q does not name the client, %s", line, want)
		}
		if n := outside(wire) + wire.Seen(0); n != 0 {
			t.Errorf("%d traces of plaintext on the wire", n)
		}
		// The control: a pair that is not enrolled.
		plain, err := e.Pod(2, 3).Greet(2525, "mail")
		e.must(err)
		control := e.wire("220 mail")
		_, err = bufio.NewReader(e.connect(e.Pod(1, 3), plain.Addr(family))).ReadString('\n')
		e.must(err)
		if control.Seen(0) == 0 {
			t.Error("control: the greeting of a pair that is not enrolled was not seen")
		}
	})
}

// notTouched asserts that an exchange reaches the application and leaves no
// trace in the tunnel's log, while one by the neighbour does.
func notTouched(t *testing.T, e *env, d *lab.Daemon, app *lab.App, family int, call func() error) {
	t.Helper()
	e.must(call())
	c := e.connect(e.Pod(1, 2), app.Addr(family)) // the control, and later in the log
	e.must(exchange(c, marker))
	c.Close()
	e.line(d, "inbound", app.Addr(family))
	all, err := d.AccessLog()
	e.must(err)
	for _, l := range all {
		if strings.HasPrefix(l.String("src.addr"), addrPrefix(app.Pod.Addr(family))) || strings.Contains(l.String("dst.addr"), "127.0.0.1") {
			t.Errorf("the tunnel carried it: %v", l)
		}
	}
}

func TestOwnAddress(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		app, err := e.Pod(1, 1).Echo(8080)
		e.must(err)
		notTouched(t, e, d[0], app, family, func() error { return exchange(e.connect(e.Pod(1, 1), app.Addr(family)), marker) })
	})
}

func TestLoopback(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		app, err := e.Pod(1, 1).Echo(8080)
		e.must(err)
		lo := netip.MustParseAddr("127.0.0.1")
		if family == 6 {
			lo = netip.IPv6Loopback()
		}
		notTouched(t, e, d[0], app, family, func() error {
			return exchange(e.connect(e.Pod(1, 1), netip.AddrPortFrom(lo, 8080)), marker)
		})
	})
}

func TestUDP(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, _ := mesh(t)
		from, to := e.Pod(1, 1), e.Pod(2, 1)
		var server net.PacketConn
		e.must(to.Do(func() (err error) { server, err = net.ListenPacket("udp", ":5353"); return err }))
		defer server.Close()
		wire := e.wire(marker)
		var c net.Conn
		e.must(from.Do(func() (err error) {
			c, err = net.Dial("udp", netip.AddrPortFrom(to.Addr(family), 5353).String())
			return err
		}))
		defer c.Close()
		_, err := c.Write([]byte(marker))
		e.must(err)
		buf := make([]byte, 100)
		e.must(server.SetReadDeadline(time.Now().Add(scaled(5 * time.Second))))
		n, src, err := server.ReadFrom(buf)
		e.must(err)
		if got := src.(*net.UDPAddr).AddrPort().Addr().Unmap(); string(buf[:n]) != marker || got != from.Addr(family) {
			t.Errorf("got %q from %s", buf[:n], got)
		}
		if wire.Seen(0) == 0 {
			t.Error("the datagram is not on the wire as it was sent")
		}
		app, err := to.Echo(8080)
		e.must(err)
		tcp := e.wire(marker)
		e.must(exchange(e.connect(from, app.Addr(family)), marker))
		if tcp.Seen(0) != 0 || inside(tcp) == 0 {
			t.Error("the TCP exchange beside it was not carried")
		}
	})
}

func TestBeyondTheMesh(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e := setup(t)
		e.start(lab.DaemonConfig{Settings: map[string]any{"mesh": map[string]any{"cidrs": []string{}}}})
		app, err := e.Pod(2, 3).Echo(8080) // nobody's workload
		e.must(err)
		wire := e.wire(marker)
		e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(family)), marker))
		if wire.Seen(0) == 0 {
			t.Error("the exchange beyond the mesh is not on the wire as it was sent")
		}
		known, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		control := e.wire(marker)
		e.must(exchange(e.connect(e.Pod(1, 1), known.Addr(family)), marker))
		if control.Seen(0) != 0 || inside(control) == 0 {
			t.Error("control: a workload's address beside it was not carried")
		}
	})
}

func TestUnknownDestination(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t) // the mesh's ranges hold all pods
		app, err := e.Pod(2, 3).Echo(8080)
		e.must(err)
		wire := e.wire(marker)
		if _, err := e.dial(e.Pod(1, 1), app.Addr(family)); !isRefused(err) {
			t.Errorf("connect to an unknown address of the mesh: %v, want it refused", err)
		}
		if n, _ := wire.Count(func(s capture.Segment) bool { return s.Dst == app.Addr(family) }); n != 0 {
			t.Errorf("%d segments to the unknown address", n)
		}
		if len(app.Peers()) != 0 {
			t.Error("the application was reached")
		}
		if n := e.sum(d[0], "culvert_redirect_decisions_total"); n == 0 {
			t.Error("no decision was counted")
		}
		// The control: from a pod that is not enrolled it is on the wire.
		e.must(exchange(e.connect(e.Pod(1, 3), app.Addr(family)), marker))
		if wire.Seen(0) == 0 {
			t.Error("control: the same exchange from a pod that is not enrolled was not seen")
		}
	})
}

func TestCapturedToPlain(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e := setup(t)
		plain := e.Pod(2, 3).Workload()
		plain.Protocol = "tcp"
		d := e.start(lab.DaemonConfig{Workloads: append(e.enrolled(), plain)})
		app, err := e.Pod(2, 3).Echo(8080)
		e.must(err)
		wire := e.wire(marker)
		e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(family)), marker))
		if got := app.Peers()[0].Addr(); got != e.Pod(1, 1).Addr(family) {
			t.Errorf("the server's peer is %s, want %s", got, e.Pod(1, 1).Addr(family))
		}
		if wire.Seen(0) == 0 {
			t.Error("a workload that says tcp was not reached in plaintext")
		}
		if n := e.sum(d[0], "culvert_redirect_decisions_total", "decision", "tcp_destination"); n == 0 {
			t.Error("plaintext to a tcp workload was not counted")
		}
	})
}

func TestNotEnrolled(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, _ := mesh(t)
		app, err := e.Pod(2, 3).Echo(8080)
		e.must(err)
		wire := e.wire(marker)
		e.must(exchange(e.connect(e.Pod(1, 3), app.Addr(family)), marker))
		if wire.Seen(0) == 0 || inside(wire) != 0 {
			t.Error("a pair that is not enrolled did not talk as without the mesh")
		}
		enrolled, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		control := e.wire(marker)
		e.must(exchange(e.connect(e.Pod(1, 1), enrolled.Addr(family)), marker))
		if control.Seen(0) != 0 {
			t.Error("control: an enrolled pair was not carried")
		}
	})
}

func TestOneHandshake(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	for range 20 {
		c := e.connect(e.Pod(1, 1), app.Addr(4))
		e.must(exchange(c, marker))
		c.Close()
	}
	e.lines(d[0], 20, "outbound", app.Addr(4))
	if n := e.sum(d[0], "mtls_handshake_success_total"); n != 1 {
		t.Errorf("%v handshakes for 20 connections of one pair, want 1", n)
	}
	c := e.connect(e.Pod(1, 2), app.Addr(4)) // another identity
	e.must(exchange(c, marker))
	if n := e.sum(d[0], "mtls_handshake_success_total"); n != 2 {
		t.Errorf("control: %v handshakes after a second identity, want 2", n)
	}
}
