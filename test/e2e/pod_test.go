// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// TestBypass: addresses that are to be left alone are.
func TestBypass(t *testing.T) {
	e := setup(t)
	listed, other := e.Pod(2, 3), e.Pod(1, 3) // nobody's workloads, inside the mesh
	d := e.start(lab.DaemonConfig{Settings: map[string]any{
		"bypass": map[string]any{"cidrs": []string{listed.V4.String() + "/32", listed.V6.String() + "/128"}},
	}})
	app, err := listed.Echo(8080)
	e.must(err)
	beside, err := other.Echo(8080)
	e.must(err)
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		const decisions = "culvert_redirect_decisions_total"
		before := e.sum(d[0], decisions, "decision", "connect_bypass")
		wire := e.wire(marker)
		e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(family)), marker))
		if wire.Seen(0) == 0 || inside(wire) != 0 {
			t.Error("the exchange is not on the wire as it was sent")
		}
		if n := e.sum(d[0], decisions, "decision", "connect_bypass") - before; n != 1 {
			t.Errorf("%v connections were counted, want 1", n)
		}
		if err := e.try(e.Pod(1, 1), beside.Addr(family)); !isRefused(err) {
			t.Errorf("control: an address beside it that is not listed: %v, want it refused", err)
		}
	})
}

// TestMPTCP: a pod has no MPTCP sockets, whose further subflows no hook sees. Who
// asks for one gets TCP, which is carried.
func TestMPTCP(t *testing.T) {
	e, _ := mesh(t)
	from := e.Pod(1, 1)
	app, err := e.Pod(2, 1).Echo(8080) // by a listener that asks for MPTCP, as Go's do
	e.must(err)
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		var dialer net.Dialer
		dialer.SetMultipathTCP(true)
		ctx, cancel := context.WithTimeout(e.ctx, patience())
		defer cancel()
		wire := e.wire(marker)
		c, err := from.DialWith(ctx, &dialer, app.Addr(family))
		e.must(err)
		defer c.Close()
		e.must(exchange(c, marker))
		if wire.Seen(0) != 0 || outside(wire) != 0 || inside(wire) == 0 {
			t.Error("a client that asks for MPTCP was not carried")
		}
		insist := func() error {
			return from.Do(func() error {
				fd, err := unix.Socket(map[int]int{4: unix.AF_INET, 6: unix.AF_INET6}[family], unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
				if err == nil {
					unix.Close(fd)
				}
				return err
			})
		}
		if err := insist(); !errors.Is(err, unix.ENOPROTOOPT) {
			t.Errorf("an MPTCP socket: %v, want %v", err, unix.ENOPROTOOPT)
		}
		set := func(v string) {
			e.must(from.Do(func() error { return os.WriteFile("/proc/sys/net/mptcp/enabled", []byte(v), 0) }))
		}
		set("1")
		if err := insist(); err != nil {
			t.Errorf("control: an MPTCP socket with the switch set back by hand: %v", err)
		}
		set("0")
	})
}

// TestConnectThen200: a 200 says that the application has the connection.
func TestConnectThen200(t *testing.T) {
	c := newPeerCheck(t)
	c.run("")
	families(t, func(t *testing.T, family int) {
		c := c.in(t)
		// A listener that nobody accepts from, and whose queue of one is full.
		l, accept := c.fullListener(c.server, family)
		s, err := c.session(c.stranger, c.server.Addr(family), peerTLS(c.goodClient))
		c.must(err)
		type result struct {
			answer
			error
		}
		answers := make(chan result, 1)
		start := time.Now()
		go func() {
			a, err := s.connect("", l)
			answers <- result{a, err}
		}()
		select {
		case a := <-answers:
			t.Errorf("answered with %d, %v before the application had the connection", a.status, a.error)
			return
		case <-time.After(quiet):
		}
		accept() // the control: then there is room, for the next SYN
		a := <-answers
		if a.error != nil || a.status != 200 {
			t.Errorf("control: status %d (%s), %v after %v", a.status, a.reason, a.error, time.Since(start))
		}
	})
}

// fullListener listens in a pod with a queue that is full. accept empties it.
func (e *env) fullListener(p *lab.Pod, family int) (at netip.AddrPort, accept func()) {
	e.t.Helper()
	fd := -1
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(raw uintptr) { fd = int(raw) })
	}}
	lc.SetMultipathTCP(false)
	var l net.Listener
	e.must(p.Do(func() (err error) {
		l, err = lc.Listen(e.ctx, "tcp", netip.AddrPortFrom(p.Addr(family), 0).String())
		return err
	}))
	e.t.Cleanup(func() { l.Close() })
	e.must(unix.Listen(fd, 0)) // changes the length of the queue
	at = l.Addr().(*net.TCPAddr).AddrPort()
	e.connect(p, at) // takes the one place
	return at, func() {
		for range 2 { // the one that waited, and the one that comes
			go func() {
				if c, err := l.Accept(); err == nil {
					e.t.Cleanup(func() { c.Close() })
				}
			}()
		}
	}
}

// TestNothingLeaks: after many connections the daemons hold what they held.
func TestNothingLeaks(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	const n = 1000
	round := func(family, n int, hold bool) (held []*net.TCPConn) {
		var all sync.WaitGroup
		var mu sync.Mutex
		work := make(chan struct{}, n)
		for range n {
			work <- struct{}{}
		}
		close(work)
		for range 20 {
			all.Go(func() {
				for range work {
					c, err := e.dial(e.Pod(1, 1), app.Addr(family))
					if err == nil {
						err = exchange(c, marker)
					}
					if err != nil {
						t.Error(err)
						return
					}
					if hold {
						mu.Lock()
						held = append(held, c)
						mu.Unlock()
					} else {
						c.Close()
					}
				}
			})
		}
		all.Wait()
		return held
	}
	fds := func(d *lab.Daemon) float64 { return e.sum(d, "process_open_fds") }
	goroutines := func(d *lab.Daemon) float64 { return e.sum(d, "go_goroutines") }
	round(4, 50, false) // the session, and a stock of sockets
	round(6, 50, false)
	before := map[*lab.Daemon][2]float64{}
	for _, d := range d {
		before[d] = [2]float64{fds(d), goroutines(d)}
	}
	held := round(4, 100, true) // the control
	for _, d := range d {
		if got := fds(d); got < before[d][0]+50 { // the round before may still have been closing
			t.Errorf("control: %s has %v descriptors with 100 connections, %v before", d.Node.Name, got, before[d][0])
		}
	}
	for _, c := range held {
		c.Close()
	}
	round(4, n/2, false)
	round(6, n/2, false)
	const slack = 128 // what the stocks of both families keep, of 1,000
	for _, d := range d {
		end := time.Now().Add(2 * patience())
		err := lab.Until(e.ctx, "descriptors and goroutines are given back", func() error {
			if f, g := fds(d), goroutines(d); f > before[d][0]+slack || g > before[d][1]+8 {
				return fmt.Errorf("%s has %v descriptors and %v goroutines, it had %v and %v", d.Node.Name, f, g, before[d][0], before[d][1])
			}
			return nil
		}, func() error {
			if time.Now().After(end) {
				return errors.New("out of patience")
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// TestRenewal: certificates are renewed, new sessions have the new ones, and live
// ones go on.
func TestRenewal(t *testing.T) {
	userSpace(t)
	m := newPeerMesh(t, lab.DaemonConfig{})
	for i, n := range m.Nodes { // again, with short lives
		m.must(m.daemons[i].Stop(m.ctx))
		m.daemons[i] = m.startOn(n, lab.DaemonConfig{
			Workloads: append(m.enrolled(), m.impostor.Workload()),
			Settings:  map[string]any{"identity": map[string]any{"ca": map[string]any{"dir": n.Dir + "/ca", "leafTTL": "2s"}}},
		})
	}
	first := m.connect(m.client, m.app(4))
	s1 := m.session()
	s1.accepts(first, marker)
	leaf := func(s *framed) string { return s.conn.ConnectionState().PeerCertificates[0].SerialNumber.Text(16) }
	old := leaf(s1)
	// New sessions, each to be ended, until one has another certificate.
	end := time.Now().Add(2 * patience())
	err := lab.Until(m.ctx, "a new session has a new certificate", func() error {
		c := m.connect(m.client, m.app(6))
		s := m.session()
		stream := s.accepts(c, marker)
		serial := leaf(s)
		s.do(func() error { return s.fr.WriteGoAway(stream, http2.ErrCodeNo, nil) })
		s.do(func() error { return s.fr.WriteData(stream, true, nil) })
		m.must(c.CloseWrite())
		if !s.ended(patience()) {
			return errors.New("the session does not end")
		}
		if serial == old {
			return errors.New("it is the old one still")
		}
		return nil
	}, func() error {
		if time.Now().After(end) {
			return errors.New("out of patience")
		}
		return nil
	})
	m.must(err)
	m.must(s1.exchange(first, marker)) // the live one goes on
	if !strings.EqualFold(old, leaf(s1)) {
		t.Error("control: the first session has another certificate")
	}
}

// TestSecondInterface: of a pod with several interfaces only the primary's
// addresses are the mesh's.
func TestSecondInterface(t *testing.T) {
	e := setup(t)
	ours, other := e.Pod(2, 1), e.Pod(2, 3)
	second := map[int][2]netip.Addr{
		4: {netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")},
		6: {netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")},
	}
	e.must(ours.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "net1"}, PeerName: "net1", PeerNamespace: netlink.NsFd(other.NS.FD()),
		})
	}))
	for i, p := range []*lab.Pod{ours, other} {
		e.must(p.Do(func() error {
			l, err := netlink.LinkByName("net1")
			if err != nil {
				return err
			}
			for family, a := range second {
				addr := &netlink.Addr{IPNet: &net.IPNet{IP: a[i].AsSlice(), Mask: net.CIDRMask(a[i].BitLen()-8, a[i].BitLen())}}
				if family == 6 {
					addr.Flags = unix.IFA_F_NODAD
				}
				err = errors.Join(err, netlink.AddrAdd(l, addr))
			}
			return errors.Join(err, netlink.LinkSetUp(l))
		}))
	}
	e.start(lab.DaemonConfig{})
	app, err := ours.Echo(8080)
	e.must(err)
	outside, err := other.Echo(8080)
	e.must(err)
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		wire := e.capture(capture.Config{NS: other.NS, Interface: "net1", Markers: []string{marker}})
		// Out of it.
		e.must(e.try(ours, netip.AddrPortFrom(second[family][1], 8080)))
		if wire.Seen(0) == 0 || len(outside.Peers()) == 0 {
			t.Error("what the pod sends by its second interface is not there as it was sent")
		}
		// Into it.
		e.must(e.try(other, netip.AddrPortFrom(second[family][0], 8080)))
		// The controls: the primary address of the same pod, both ways.
		if err := e.try(other, app.Addr(family)); !isRefused(err) {
			t.Errorf("control: plaintext to the primary address: %v, want it refused", err)
		}
		carried := e.wire(marker)
		e.must(e.try(e.Pod(1, 1), app.Addr(family)))
		if carried.Seen(0) != 0 || inside(carried) == 0 {
			t.Error("control: the primary address was not reached by the tunnel")
		}
	})
}
