// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

const (
	retries = "culvert_delivery_retries_total"
	marked  = "culvert_deliveries_to_marked_listeners_total"
)

// listener is an application's, of whose socket a test knows more.
type listener struct {
	t *testing.T
	*net.TCPListener

	mu    sync.Mutex
	peers []netip.AddrPort
}

// listen listens in a pod for both families. prepare, if there is one, sets
// options of the socket. Nothing is accepted yet.
func (e *env) listen(p *lab.Pod, prepare func(fd int) error) *listener {
	e.t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if prepare == nil {
			return nil
		}
		cerr := c.Control(func(fd uintptr) { err = prepare(int(fd)) })
		return errors.Join(err, cerr)
	}}
	lc.SetMultipathTCP(false)
	var l net.Listener
	e.must(p.Do(func() (err error) { l, err = lc.Listen(e.ctx, "tcp", ":0"); return err }))
	e.t.Cleanup(func() { l.Close() })
	return &listener{t: e.t, TCPListener: l.(*net.TCPListener)}
}

// echo accepts, and sends back what it gets.
func (l *listener) echo() *listener {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			l.mu.Lock()
			l.peers = append(l.peers, lab.Peer(c))
			l.mu.Unlock()
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
	return l
}

// from is who has connected from an address.
func (l *listener) from(a netip.Addr) (peers []netip.AddrPort) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.peers {
		if p.Addr() == a {
			peers = append(peers, p)
		}
	}
	return peers
}

func (l *listener) at(p *lab.Pod, family int) netip.AddrPort {
	return netip.AddrPortFrom(p.Addr(family), l.Addr().(*net.TCPAddr).AddrPort().Port())
}

// socket does something with the socket.
func (l *listener) socket(f func(fd int) error) {
	l.t.Helper()
	rc, err := l.SyscallConn()
	if err == nil {
		if cerr := rc.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
			err = cerr
		}
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

// swallow has the kernel drop what comes for the listener from some ports, or
// from any where none is given. Accepted sockets inherit it.
func (l *listener) swallow(ports ...uint16) {
	l.t.Helper()
	const all = 0xffff
	var f []unix.SockFilter
	if len(ports) > 0 {
		f = append(f, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 0}) // the source port
		for _, p := range ports {
			f = append(f,
				unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(p), Jf: 1},
				unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0})
		}
		f = append(f, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: all})
	} else {
		f = append(f, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0})
	}
	l.socket(func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]})
	})
}

// swallowed is how many packets the listener has dropped.
func (l *listener) swallowed() (n uint32) {
	l.t.Helper()
	const soMeminfo, drops = 55, 8 // asm-generic/socket.h; SK_MEMINFO_DROPS of linux/sock_diag.h
	l.socket(func(fd int) error {
		var info [drops + 1]uint32
		size := uint32(unsafe.Sizeof(info))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, soMeminfo,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			return errno
		}
		n = info[drops]
		return nil
	})
	return n
}

// connecting waits for a delivery whose SYN is unanswered, and returns its port.
func (e *env) connecting(p *lab.Pod, to netip.AddrPort) (port uint16) {
	e.t.Helper()
	e.until("a delivery is under way", func() error {
		all, err := sockdiag.List(p.NS, 1<<unix.BPF_TCP_SYN_SENT)
		if err != nil {
			return err
		}
		for _, s := range all {
			if s.Remote == to {
				port = s.Local.Port()
				return nil
			}
		}
		return errors.New("none")
	})
	return port
}

// until waits for f within patience.
func (e *env) until(what string, f func() error) {
	e.t.Helper()
	e.must(lab.Until(e.ctx, what, f, lab.Within(patience())))
}

// TestDeliveryTriesAnotherPort: a SYN that nobody answers may have met a socket of
// the same four-tuple.
func TestDeliveryTriesAnotherPort(t *testing.T) {
	e, d := mesh(t)
	client, server := e.Pod(1, 1), e.Pod(2, 1)
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		app := e.listen(server, nil).echo()
		app.swallow()
		c := e.connect(client, app.at(server, family))
		first := e.connecting(server, app.at(server, family))
		app.swallow(first)
		e.must(exchange(c, marker))
		peers := app.from(client.Addr(family))
		if len(peers) != 1 || peers[0].Port() == first {
			t.Errorf("the application's peers are %v, want one, with another port than %d", peers, first)
		}
		if e.sum(d[1], retries) == 0 {
			t.Error("it is not counted")
		}
		if app.swallowed() == 0 {
			t.Error("control: no SYN was swallowed")
		}
		// The control: what is answered at once has one port.
		before := e.sum(d[1], retries)
		app.swallow(9)
		e.must(e.try(client, app.at(server, family)))
		if n := e.sum(d[1], retries) - before; n != 0 {
			t.Errorf("control: %v more tries for a connection that is answered", n)
		}
	})
}

// mirrors are plaintext connections of one client to one application, from ports of
// deliveries' range: so many that of as many deliveries as there are to be some
// would meet one if they were not avoided. (Of 22,528 ports 300 are avoided 1,600
// times: by chance with a probability of e^-21.)
const (
	mirrors    = 300
	deliveries = 1600
)

// mirror opens them, and holds them.
func (e *env) mirror(from *lab.Pod, to netip.AddrPort) {
	e.t.Helper()
	local := from.V4
	if to.Addr().Is6() {
		local = from.V6
	}
	for port, held := uint16(10240), 0; held < mirrors; port += 37 {
		if port > 32767-37 {
			e.t.Fatalf("%d plaintext connections, want %d", held, mirrors)
		}
		ctx, cancel := context.WithTimeout(e.ctx, scaled(time.Second))
		c, err := from.DialWith(ctx, &net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, port))}, to)
		cancel()
		if isTimeout(err) || errors.Is(err, context.DeadlineExceeded) {
			continue // it has met the delivery of one before it: a known limit
		}
		e.must(err)
		e.t.Cleanup(func() { c.Close() })
		e.must(exchange(c, "plain")) // the control: it is served
		held++
	}
}

// TestMirroredTuple: deliveries do not meet a client's live plaintext connections,
// neither those from before the enrolment nor those that are let in. That they
// would go unanswered is shown in redirect.
func TestMirroredTuple(t *testing.T) {
	t.Run("kept", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			e := setup(t)
			client, server := e.Pod(1, 1), e.Pod(2, 1)
			app, err := server.Echo(8080)
			e.must(err)
			e.mirror(client, app.Addr(family))
			d := e.start(lab.DaemonConfig{})
			e.until("they are seen", func() error {
				if n := e.sum(d[1], "culvert_existing_connections"); n < mirrors {
					return fmt.Errorf("%v, want %d", n, mirrors)
				}
				return nil
			})
			for range deliveries {
				e.must(e.call(client, app.Addr(family)))
			}
			if n := e.sum(d[1], retries); n != 0 {
				t.Errorf("%v of %d deliveries went unanswered", n, deliveries)
			}
		})
	})
	t.Run("permissive", func(t *testing.T) {
		e, d := permissive(t)
		stranger, server := e.Pod(1, 3), e.Pod(2, 1)
		app, err := server.Echo(8080)
		e.must(err)
		svid := e.svid(e.authority(), stranger.Identity())
		families(t, func(t *testing.T, family int) {
			e := e.in(t)
			e.mirror(stranger, app.Addr(family))
			s, err := e.session(stranger, server.Addr(family), peerTLS(svid))
			e.must(err)
			for range deliveries {
				e.must(s.SetDeadline(time.Now().Add(patience())))
				stream, err := s.carry(app.Addr(family))
				e.must(err)
				e.must(s.WriteRSTStream(stream, http2.ErrCodeCancel))
			}
			if n := e.sum(d[1], retries); n != 0 {
				t.Errorf("%v of %d deliveries went unanswered", n, deliveries)
			}
		})
	})
}

// TestSlowListener: a listener whose queue is full for seconds is reached once
// there is room, by one connection for one.
func TestSlowListener(t *testing.T) {
	e, d := mesh(t)
	client, server := e.Pod(1, 1), e.Pod(2, 1)
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		app := e.listen(server, nil)
		app.socket(func(fd int) error { return unix.Listen(fd, 0) }) // one place
		dst := app.at(server, family)
		e.connect(server, dst) // takes it
		before := e.sum(d[1], retries)
		c := e.connect(client, dst)
		e.until("all ports were tried", func() error {
			if n := e.sum(d[1], retries) - before; n < 3 {
				return fmt.Errorf("%v more", n)
			}
			return nil
		})
		if app.swallowed() == 0 {
			t.Error("control: the queue was never full")
		}
		app.echo()
		e.must(exchange(c, marker))
		e.must(e.try(client, dst)) // behind it nothing waits
		if peers := app.from(client.Addr(family)); len(peers) != 2 {
			t.Errorf("the application's peers are %v, want one for each connection", peers)
		}
	})
}

func mark(value int) func(int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, value) }
}

// TestListenerWithMark: a known limit. What an application's listener accepts has
// that listener's mark, and its answers do not find back to lo.
func TestListenerWithMark(t *testing.T) {
	e := setup(t)
	d := e.start(tunnelSettings(map[string]any{"connectTimeout": "500ms"}))
	server := e.Pod(2, 1)
	with, without := e.listen(server, mark(7)).echo(), e.listen(server, mark(0)).echo()
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		dst := with.at(server, family)
		watch1, watch2 := e.watch(d[0]), e.watch(d[1])
		out := e.capture(capture.Config{NS: server.Node.NS, Interface: server.HostEnd()})
		if err := e.try(e.Pod(1, 1), dst); !isReset(err) {
			t.Errorf("the client saw %v, want a reset", err)
		}
		for direction, watch := range map[string]*watch{"outbound": watch1, "inbound": watch2} {
			if r := watch.closed(direction, dst).String("reason"); r != "timeout" {
				t.Errorf("%s: reason %q, want timeout", direction, r)
			}
		}
		if n := outside(out); n != 0 {
			t.Errorf("%d segments with payload outside the tunnel", n)
		}
		e.must(e.try(e.Pod(1, 1), without.at(server, family))) // the control
	})
}

// TestListenerWithMarkIsNamed: why it times out is found out, counted, and said
// once for each listener.
func TestListenerWithMarkIsNamed(t *testing.T) {
	e := setup(t)
	d := e.start(tunnelSettings(map[string]any{"connectTimeout": "500ms"}))
	client, server := e.Pod(1, 1), e.Pod(2, 1)
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		with, without := e.listen(server, mark(7)).echo(), e.listen(server, nil).echo()
		without.swallow()
		named := func(l *listener) (lines []string) {
			b, err := os.ReadFile(d[1].LogFile)
			e.must(err)
			for line := range strings.Lines(string(b)) {
				if strings.Contains(line, "has a mark of its own") && strings.Contains(line, fmt.Sprintf(":%d", l.at(server, family).Port())) {
					lines = append(lines, line)
				}
			}
			return lines
		}
		before := e.sum(d[1], marked)
		const times = 2
		for range times {
			watch := e.watch(d[1])
			if err := e.try(client, with.at(server, family)); !isReset(err) {
				t.Errorf("the client saw %v, want a reset", err)
			}
			l := watch.closed("inbound", with.at(server, family))
			if l.String("reason") != "timeout" || !strings.Contains(l.String("detail"), "SO_MARK 0x7") {
				t.Errorf("access log: reason %q, detail %q, want timeout and the mark", l.String("reason"), l.String("detail"))
			}
		}
		if n := e.sum(d[1], marked) - before; n != times {
			t.Errorf("%v deliveries are counted, want %d", n, times)
		}
		if lines := named(with); len(lines) != 1 || !strings.Contains(lines[0], "mark=0x7") || !strings.Contains(lines[0], "hint=") {
			t.Errorf("the log names it in %q, want one line with mark and hint", lines)
		}
		// The control: another that does not answer either.
		watch := e.watch(d[1])
		if err := e.try(client, without.at(server, family)); !isReset(err) {
			t.Errorf("control: the client saw %v, want a reset", err)
		}
		l := watch.closed("inbound", without.at(server, family))
		if l.String("reason") != "timeout" || strings.Contains(l.String("detail"), "mark") {
			t.Errorf("control: access log: reason %q, detail %q", l.String("reason"), l.String("detail"))
		}
		if n := e.sum(d[1], marked) - before; n != times || len(named(without)) != 0 {
			t.Errorf("control: %v deliveries are counted, want %d; the log has %q", n, times, named(without))
		}
	})
}

// TestUnreachable: a pod whose loopback device is down, over which deliveries go.
func TestUnreachable(t *testing.T) {
	e, d := mesh(t)
	stranger, client := e.Pod(1, 3), e.Pod(1, 1)
	svid := e.svid(e.authority(), stranger.Identity())
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		server := map[int]*lab.Pod{4: e.Pod(2, 1), 6: e.Pod(2, 2)}[family] // our routes by lo go with it
		app, err := server.Echo(8080)
		e.must(err)
		dst := app.Addr(family)
		s, err := e.session(stranger, server.Addr(family), peerTLS(svid))
		e.must(err)
		e.carries(s, dst) // the control
		reached := len(app.Peers())
		e.must(server.Do(func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return netlink.LinkSetDown(lo)
		}))
		bare := e.watch(d[1])
		a, err := s.connect(marker, dst)
		if err != nil || a.status != 503 || a.reason != "unreachable" {
			t.Errorf("status %d (%s), %v, want 503 (unreachable)", a.status, a.reason, err)
		}
		l := bare.closed("inbound", dst)
		// IPv6 says either, by which of its routes goes first.
		detail := l.String("detail")
		if l.String("reason") != "unreachable" || !strings.Contains(detail, "network is unreachable") && !strings.Contains(detail, "no route to host") {
			t.Errorf("access log: reason %q, detail %q", l.String("reason"), detail)
		}
		// A client of ours sees a reset, and both ends say why.
		watch1, watch2 := e.watch(d[0]), e.watch(d[1])
		if err := e.try(client, dst); !isReset(err) {
			t.Errorf("the client saw %v, want a reset", err)
		}
		for direction, watch := range map[string]*watch{"outbound": watch1, "inbound": watch2} {
			if r := watch.closed(direction, dst).String("reason"); r != "unreachable" {
				t.Errorf("%s: reason %q, want unreachable", direction, r)
			}
		}
		if n := len(app.Peers()) - reached; n != 0 {
			t.Errorf("%d connections to the application", n)
		}
	})
}
