// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/socket"
)

// family is what a test needs of one.
type family struct {
	v6                         bool
	pod, outside, remote, loop netip.Addr
	any                        netip.Addr
	outbound, hbone            redirect.Slot
	transparent                [2]int // level, option
}

var families = map[string]family{
	"v4": {false, pod4, outside4, remote4, netip.MustParseAddr("127.0.0.1"), netip.IPv4Unspecified(), redirect.Outbound4, redirect.HBONE4, [2]int{unix.SOL_IP, unix.IP_TRANSPARENT}},
	"v6": {true, pod6, outside6, remote6, netip.IPv6Loopback(), netip.IPv6Unspecified(), redirect.Outbound6, redirect.HBONE6, [2]int{unix.SOL_IPV6, unix.IPV6_TRANSPARENT}},
}

// both runs a test once for each family, in a world of its own.
func both(t *testing.T, f func(w *world, f family)) {
	for name, fam := range families {
		t.Run(name, func(t *testing.T) { f(newWorld(t), fam) })
	}
}

// atOnce bounds a refusal.
func atOnce() time.Duration {
	return 50 * time.Millisecond * lab.Slowness()
}

// refused checks that f fails as a closed port does, at once.
func (w *world) refused(what string, f func() error) {
	w.t.Helper()
	begin := time.Now()
	err := f()
	if took := time.Since(begin); !errors.Is(err, unix.ECONNREFUSED) || took > atOnce() {
		w.t.Errorf("%s: %v after %v, want connection refused within %v", what, err, took, atOnce())
	}
}

func (w *world) empty(listeners ...int) {
	w.t.Helper()
	for _, l := range listeners {
		if pending(l) {
			w.t.Errorf("a connection waits at %s", local(l))
		}
	}
}

// Plaintext from outside gets a reset for its SYN.
func TestStrict(t *testing.T) {
	both(t, func(w *world, f family) {
		app := w.listen(w.pod, at(f.pod, 8080))
		fd, err := w.connect(w.outside, at(f.pod, 8080), nil) // not enrolled
		w.must(err)
		w.exchange(fd, w.accept(app))
		w.start()
		n := w.counted(func() {
			for _, port := range []uint16{8080, 15001, 15006, 22} {
				dst := at(f.pod, port)
				w.refused(dst.String(), func() error { _, err := w.connect(w.outside, dst, nil); return err })
			}
			fd, err := w.connect(w.outside, at(f.pod, 15008), nil)
			w.must(err)
			c := w.accept(w.listeners[f.hbone])
			w.exchange(fd, c)
			if peer(c) != local(fd) || local(c) != at(f.pod, 15008) {
				w.t.Errorf("the tunnel sees %s and %s", peer(c), local(c))
			}
		})
		if n["strict_refused"] != 4 || n["steer_hbone"] != 1 {
			w.t.Errorf("counted %v", n)
		}
		w.empty(app, w.listeners[f.outbound])
	})
}

// An address of eth0 that nobody has declared is no way around; the pod itself
// reaches it. What is on lo is left alone.
func TestUndeclaredAddress(t *testing.T) {
	both(t, func(w *world, f family) {
		extra, onLo := netip.MustParseAddr("10.99.0.101"), netip.MustParseAddr("192.0.2.1")
		if f.v6 {
			extra, onLo = netip.MustParseAddr("fd99::101"), netip.MustParseAddr("2001:db8::1")
		}
		w.in(w.pod, func() error { return errors.Join(addAddr("eth0", extra), addAddr("lo", onLo)) })
		w.start()
		app := w.listen(w.pod, at(f.any, 8080))
		for _, port := range []uint16{8080, 15001, 15008} {
			w.refused("from outside", func() error { _, err := w.connect(w.outside, at(extra, port), nil); return err })
		}
		w.empty(app)
		for _, a := range []netip.Addr{extra, onLo} {
			fd, err := w.connect(w.pod, at(a, 8080), nil)
			if err != nil {
				w.t.Errorf("the pod calls its own %s: %v", a, err)
				continue
			}
			w.exchange(fd, w.accept(app))
		}
		w.empty(w.listeners[f.outbound], w.listeners[f.hbone])
	})
}

func addAddr(device string, a netip.Addr) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(netip.PrefixFrom(a, a.BitLen()-8).String())
	if err != nil {
		return err
	}
	if a.Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(link, addr)
}

// An own address arrives with eth0, which the route says, and passes.
func TestOwnAddress(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		app := w.listen(w.pod, at(f.pod, 8080))
		n := w.counted(func() {
			fd, err := w.connect(w.pod, at(f.pod, 8080), nil)
			w.must(err)
			w.exchange(fd, w.accept(app))
			// From loopback to it.
			fd, err = w.connect(w.pod, at(f.pod, 8080), func(fd int) error { return unix.Bind(fd, sockaddr(at(f.loop, 0))) })
			w.must(err)
			w.exchange(fd, w.accept(app))
			w.refused("from outside", func() error { _, err := w.connect(w.outside, at(f.pod, 8080), nil); return err })
		})
		if n["steer_own_address"] != 2 || n["strict_refused"] != 1 {
			w.t.Errorf("counted %v", n)
		}
	})
}

// Without src the destination would be the source address.
func TestLocalRouteSource(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		fd, err := w.connect(w.pod, at(f.remote, 8080), nil)
		w.must(err)
		if got := local(fd).Addr(); got != f.pod {
			w.t.Errorf("the source is %s, want %s", got, f.pod)
		}
	})
}

// A pod that dials the tunnel's ports reaches no listener of ours, but as any
// other destination.
func TestOwnPorts(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		n := w.counted(func() {
			for _, a := range []netip.Addr{f.loop, f.pod} {
				for _, port := range []uint16{15001, 15006, 15008} {
					w.refused(at(a, port).String(), func() error { _, err := w.connect(w.pod, at(a, port), nil); return err })
				}
			}
		})
		if n["steer_dropped_own_port"] != 6 {
			w.t.Errorf("counted %v", n)
		}
		w.empty(w.listeners[f.outbound], w.listeners[f.hbone])
		_, err := w.connect(w.pod, at(f.remote, 15008), nil)
		w.must(err)
		if c := w.accept(w.listeners[f.outbound]); local(c) != at(f.remote, 15008) {
			w.t.Errorf("the tunnel sees the destination %s", local(c))
		}
	})
}

// take takes a delivery socket.
func (w *world) take(s *socket.Stock, v6 bool) int {
	w.t.Helper()
	fd, ok := s.Take(v6)
	if !ok {
		got := make(chan int, 1)
		s.Wait(v6, func(fd int, err error) {
			if err != nil {
				w.t.Error(err)
			}
			got <- fd
		})
		select {
		case fd = <-got:
		case <-time.After(patience):
			w.t.Fatal("no delivery socket has come")
		}
	}
	if fd < 0 {
		w.t.FailNow()
	}
	w.closing(fd)
	return fd
}

func deliver(fd int, client netip.Addr, dst netip.AddrPort) error {
	return finish(fd, socket.Deliver(fd, client, dst, nil))
}

// Deliveries reach the application with the client's address, and never the
// tunnel.
func TestDelivery(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		stock := w.maker.Stock(w.pod)
		defer stock.Close()
		app := w.listen(w.pod, at(f.pod, 8080))
		n := w.counted(func() {
			// A stranger's address, and one that the pod knows by its link.
			for _, client := range []netip.Addr{f.remote, f.outside} {
				fd := w.take(stock, f.v6)
				if err := deliver(fd, client, at(f.pod, 8080)); err != nil {
					w.t.Fatalf("deliver from %s: %v", client, err)
				}
				c := w.accept(app)
				w.must(limit(fd))
				w.exchange(fd, c)
				if p := peer(c); p.Addr() != client || p.Port() < 10240 || p.Port() > 32767 {
					w.t.Errorf("the application sees %s", p)
				}
				// A killed daemon is a reset.
				unix.Close(fd)
				if _, err := unix.Read(c, make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					w.t.Errorf("after the tunnel's end the application reads %v", err)
				}
			}
		})
		if n["steer_delivery"] != 2 {
			w.t.Errorf("counted %v", n)
		}
		w.refused("a closed port", func() error { return deliver(w.take(stock, f.v6), f.remote, at(f.pod, 9)) })
		for _, port := range []uint16{15001, 15008} {
			w.refused("a port of ours", func() error { return deliver(w.take(stock, f.v6), f.remote, at(f.pod, port)) })
		}
		// A service that balances onto its caller.
		fd := w.take(stock, f.v6)
		if err := deliver(fd, f.pod, at(f.pod, 8080)); err != nil {
			w.t.Errorf("deliver from the pod to itself: %v", err)
		} else {
			w.must(limit(fd))
			w.exchange(fd, w.accept(app))
		}
		w.empty(w.listeners[f.outbound], w.listeners[f.hbone])
	})
}

// The resets of an application's closed port return over lo: nothing leaves.
func TestHalfClosedDelivery(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		stock := w.maker.Stock(w.pod)
		defer stock.Close()
		app := w.listen(w.pod, at(f.pod, 8080))
		fd := w.take(stock, f.v6)
		w.must(deliver(fd, f.remote, at(f.pod, 8080)))
		c := w.accept(app)
		w.must(limit(fd))
		w.must(unix.Shutdown(fd, unix.SHUT_WR))
		if n, err := unix.Read(c, make([]byte, 1)); n != 0 || err != nil {
			w.t.Fatalf("read %d, %v, want the end of the stream", n, err)
		}
		if _, err := unix.Write(c, []byte("word")); err != nil {
			w.t.Fatal(err)
		}
		if n, err := unix.Read(fd, make([]byte, 8)); n != 4 || err != nil {
			w.t.Fatalf("read %d, %v after a half-close, want 4", n, err)
		}
	})
}

// Members of the listener's reuseport group get nothing.
func TestReuseportGroup(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		for _, fd := range w.listeners {
			unix.Close(fd)
		}
		clear(w.listeners)
		member := func() (fd int) {
			w.in(w.pod, func() (err error) {
				if fd, err = tcp(f.v6); err != nil {
					return err
				}
				return errors.Join(
					unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
					unix.SetsockoptInt(fd, f.transparent[0], f.transparent[1], 1),
					unix.Bind(fd, sockaddr(at(f.any, 15001))),
					unix.Listen(fd, 128))
			})
			return fd
		}
		ours, other := member(), member()
		w.closing(other)
		w.listeners[f.outbound] = ours
		w.must(w.redirected.Listen(f.outbound, ours))
		for range 64 {
			_, err := w.connect(w.pod, at(f.remote, 8080), nil)
			w.must(err)
			w.accept(ours)
		}
		w.empty(other)
	})
}

// A route with a source goes when its address goes; nothing may leave by the
// next best, not by one on the link either (SO_DONTROUTE). It is put back within
// tenths of a second: then the tunnel has the connection.
func TestWithoutRouteNothingLeaves(t *testing.T) {
	for name, prepare := range map[string]func(int) error{
		"plain":        nil,
		"SO_DONTROUTE": func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DONTROUTE, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(w *world, f family) {
				out := w.listen(w.outside, at(f.outside, 8080))
				fd, err := w.connect(w.pod, at(f.outside, 8080), prepare) // the control
				w.must(err)
				w.exchange(fd, w.accept(out))
				w.start()
				w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{f.outside: redirect.DestinationHBONE}))
				w.in(w.pod, func() error {
					nl := unix.AF_INET
					if f.v6 {
						nl = unix.AF_INET6
					}
					routes, lerr := netlink.RouteListFiltered(nl, &netlink.Route{Table: 0x53a, Type: unix.RTN_LOCAL}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
					if lerr != nil || len(routes) != 1 {
						return fmt.Errorf("our route: %v, %w", routes, lerr)
					}
					if err := netlink.RouteDel(&routes[0]); err != nil {
						return err
					}
					fd, err = connect(at(f.outside, 8080), prepare)
					return nil
				})
				w.closing(fd)
				if err == nil {
					w.accept(w.listeners[f.outbound]) // put back already
				}
				w.empty(out)
			})
		})
	}
}
