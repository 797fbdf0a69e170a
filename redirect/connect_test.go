// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/redirect"
)

func mapped(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }

func bindToEth0(fd int) error { return unix.BindToDevice(fd, "eth0") }

// A carried connection arrives at the outbound listener with its real ends, and
// the application sees the destination as its peer.
func TestConnectionsAreCarried(t *testing.T) {
	w := newWorld(t)
	w.start()
	for _, tt := range []struct {
		name    string
		dst     netip.Addr
		prepare func(fd int) error
		count   string // beside carried
	}{
		{"v4", remote4, nil, ""},
		{"v6", remote6, nil, ""},
		{"v4-mapped", mapped(remote4), nil, ""},
		{"foreign mark", remote4, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x77) }, "connect_mark_replaced"},
		{"foreign mark v6", remote6, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x77) }, "connect_mark_replaced"},
		{"our mark, forged", remote4, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x53a) }, ""},
		{"bound to eth0", remote4, bindToEth0, "connect_rebound"},
		{"bound to eth0, v6", remote6, bindToEth0, "connect_rebound"},
		{"bound to eth0, v4-mapped", mapped(remote4), bindToEth0, "connect_rebound"},
		{"bound to its address", remote4, func(fd int) error { return unix.Bind(fd, sockaddr(at(pod4, 0))) }, ""},
		{"bound to its address, v6", remote6, func(fd int) error { return unix.Bind(fd, sockaddr(at(pod6, 0))) }, ""},
		{"fast open", remote4, func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1) }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := *w
			w.t = t
			dst := at(tt.dst, 8080)
			l, own := w.listeners[redirect.Outbound4], pod4
			if !tt.dst.Unmap().Is4() {
				l, own = w.listeners[redirect.Outbound6], pod6
			}
			n := w.counted(func() {
				fd, err := w.connect(w.pod, dst, tt.prepare)
				if err != nil {
					t.Fatalf("connect: %v", err)
				}
				if tt.name == "fast open" {
					if _, err := unix.Write(fd, []byte("early")); err != nil {
						t.Fatal(err)
					}
				}
				c := w.accept(l)
				want := at(tt.dst.Unmap(), 8080)
				if got := local(c); got != want {
					t.Errorf("the tunnel sees the destination %s, want %s", got, want)
				}
				if got := peer(c); got != local(fd) || got.Addr() != own {
					t.Errorf("the tunnel sees the client %s, it is %s, want %s", got, local(fd), own)
				}
				if got := peer(fd); got != want {
					t.Errorf("the application sees the peer %s, want %s", got, want)
				}
				if tt.name == "fast open" {
					buf := make([]byte, 8)
					if n, err := unix.Read(c, buf); err != nil || string(buf[:n]) != "early" {
						t.Fatalf("read: %v", err)
					}
				}
				w.exchange(fd, c)
			})
			if n["connect_carried"] != 1 || n["steer_outbound"] != 1 || tt.count != "" && n[tt.count] != 1 {
				t.Errorf("counted %v", n)
			}
		})
	}
}

// The kernel lets only CAP_NET_RAW bind a bound socket again; whatever it does,
// nothing leaves by eth0 as it is.
func TestUnprivilegedBoundToDeviceDoesNotEscape(t *testing.T) {
	w := newWorld(t)
	w.start()
	out := w.listen(w.outside, netip.MustParseAddrPort("0.0.0.0:8080"))
	w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{outside4: redirect.DestinationHBONE}))
	n := w.counted(func() {
		err := w.connectUnprivileged(w.pod, at(outside4, 8080), bindToEth0)
		if err == nil {
			w.accept(w.listeners[redirect.Outbound4])
		} else if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connect: %v", err)
		}
	})
	if pending(out) {
		t.Error("it has reached the outside")
	}
	if n["connect_rebound"]+n["connect_refused_device"] != 1 {
		t.Errorf("counted %v", n)
	}
	t.Logf("counted %v", n)
}

// What is none of the tunnel's business goes its own way.
func TestConnectionsPass(t *testing.T) {
	w := newWorld(t)
	w.start()
	any4, any6 := netip.MustParseAddrPort("0.0.0.0:8080"), netip.MustParseAddrPort("[::]:8080")
	pod, podv6 := w.listen(w.pod, any4), w.listen(w.pod, at(pod6, 8080))
	loop6 := w.listen(w.pod, netip.MustParseAddrPort("[::1]:8080"))
	out, outv6 := w.listen(w.outside, any4), w.listen(w.outside, any6)
	tcpDst := map[netip.Addr]redirect.Destination{outside4: redirect.DestinationTCP, outside6: redirect.DestinationTCP}
	carried := map[netip.Addr]redirect.Destination{outside4: redirect.DestinationHBONE, outside6: redirect.DestinationHBONE}
	for _, tt := range []struct {
		name   string
		dst    string
		l      int
		known  map[netip.Addr]redirect.Destination
		mesh   string
		bypass string
		counts []string
	}{
		{"loopback", "127.0.0.1:8080", pod, nil, "0.0.0.0/0", "", []string{"connect_loopback", "steer_loopback"}},
		{"loopback v6", "[::1]:8080", loop6, nil, "::/0", "", []string{"connect_loopback", "steer_loopback"}},
		{"loopback v4-mapped", "[::ffff:127.0.0.1]:8080", pod, nil, "0.0.0.0/0", "", []string{"connect_loopback", "steer_loopback"}},
		{"unspecified", "0.0.0.0:8080", pod, nil, "0.0.0.0/0", "", []string{"connect_loopback"}},
		{"own address", "10.99.0.1:8080", pod, nil, "0.0.0.0/0", "", []string{"connect_own_address", "steer_own_address"}},
		{"own address v6", "[fd99::1]:8080", podv6, nil, "::/0", "", []string{"connect_own_address", "steer_own_address"}},
		{"own address v4-mapped", "[::ffff:10.99.0.1]:8080", pod, nil, "", "", []string{"connect_own_address", "steer_own_address"}},
		{"own address, a known workload", "10.99.0.1:8080", pod, map[netip.Addr]redirect.Destination{pod4: redirect.DestinationHBONE}, "", "", []string{"connect_own_address", "steer_own_address"}},
		{"outside the mesh", "10.99.0.2:8080", out, nil, "10.98.0.0/16", "", []string{"connect_outside"}},
		{"outside the mesh, which has all of IPv6", "10.99.0.2:8080", out, nil, "::/0", "", []string{"connect_outside"}},
		{"outside the mesh v6", "[fd99::2]:8080", outv6, nil, "fd98::/16", "", []string{"connect_outside"}},
		{"tcp workload", "10.99.0.2:8080", out, tcpDst, "10.99.0.0/16", "", []string{"tcp_destination"}},
		{"tcp workload v6", "[fd99::2]:8080", outv6, tcpDst, "fd99::/16", "", []string{"tcp_destination"}},
		{"tcp workload v4-mapped", "[::ffff:10.99.0.2]:8080", out, tcpDst, "", "", []string{"tcp_destination"}},
		{"bypass", "10.99.0.2:8080", out, carried, "10.99.0.0/16", "10.99.0.2/32", []string{"connect_bypass"}},
		{"bypass v6", "[fd99::2]:8080", outv6, carried, "fd99::/16", "fd99::2/128", []string{"connect_bypass"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := *w
			w.t = t
			w.must(w.node.SetDestinations(tt.known))
			w.must(w.node.SetMeshCIDRs(prefixes(tt.mesh)))
			w.must(w.node.SetBypass(prefixes(tt.bypass)))
			n := w.counted(func() {
				fd, err := w.connect(w.pod, netip.MustParseAddrPort(tt.dst), nil)
				if err != nil {
					t.Fatalf("connect: %v", err)
				}
				w.exchange(fd, w.accept(tt.l))
			})
			for _, c := range tt.counts {
				if n[c] != 1 {
					t.Errorf("%s is not counted: %v", c, n)
				}
			}
		})
	}
	t.Run("a namespace that is not enrolled", func(t *testing.T) {
		w := *w
		w.t = t
		w.must(w.node.SetDestinations(carried))
		w.must(w.node.SetBypass(nil))
		n := w.counted(func() {
			fd, err := w.connect(w.outside, at(outside4, 8080), nil)
			if err != nil {
				t.Fatal(err)
			}
			w.exchange(fd, w.accept(out))
		})
		if n["connect_not_enrolled"] == 0 || n["connect_carried"] != 0 {
			t.Errorf("counted %v", n)
		}
	})
	t.Run("UDP", func(t *testing.T) {
		w := *w
		w.t = t
		n := w.counted(func() {
			w.in(w.pod, func() error {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if err := unix.Connect(fd, sockaddr(at(outside4, 53))); err != nil {
					return err
				}
				if m, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK); err != nil || m != 0 {
					t.Errorf("mark %#x, %v", m, err)
				}
				return nil
			})
		})
		if n["connect_not_tcp"] == 0 {
			t.Errorf("counted %v", n)
		}
	})
}

func prefixes(s string) []netip.Prefix {
	if s == "" {
		return nil
	}
	return []netip.Prefix{netip.MustParsePrefix(s)}
}

// What must not leave in plaintext and cannot be carried is refused at once.
func TestConnectionsAreRefused(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{
		remote4:  redirect.DestinationHBONE,
		outside4: redirect.DestinationRefuse,
		outside6: redirect.DestinationRefuse,
	}))
	w.must(w.node.SetMeshCIDRs([]netip.Prefix{netip.MustParsePrefix("10.98.0.0/16"), netip.MustParsePrefix("fd98::/16")}))
	w.listen(w.outside, netip.MustParseAddrPort("0.0.0.0:8080"))
	for _, tt := range []struct{ name, dst, count string }{
		{"unknown in the mesh", "10.98.0.99:8080", "connect_refused_unknown"},
		{"unknown in the mesh v6", "[fd98::99]:8080", "connect_refused_unknown"},
		{"unknown in the mesh v4-mapped", "[::ffff:10.98.0.99]:8080", "connect_refused_unknown"},
		{"known to be dead", "10.99.0.2:8080", "connect_refused_destination"},
		{"known to be dead v6", "[fd99::2]:8080", "connect_refused_destination"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := *w
			w.t = t
			start := time.Now()
			n := w.counted(func() {
				if _, err := w.connect(w.pod, netip.MustParseAddrPort(tt.dst), nil); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("connect: %v", err)
				}
			})
			if d := time.Since(start); d > atOnce() {
				t.Errorf("refused after %v", d)
			}
			if n[tt.count] != 1 {
				t.Errorf("counted %v", n)
			}
		})
	}
}

// A pod that is enrolled, and not seen to work yet, is refused what is to be carried,
// also one that has been carried before; probes pass, its own address, and what is no
// concern of ours.
func TestEnrolledIsRefusedUntilCarry(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		w.must(w.redirected.Enrol())
		to := netip.AddrPortFrom(f.remote, 8080)
		w.refused("before Carry", func() error { _, err := w.connect(w.pod, to, nil); return err })
		w.listen(w.outside, netip.AddrPortFrom(f.outside, 8080))
		if _, err := w.connect(w.pod, netip.AddrPortFrom(f.outside, 8080), nil); err != nil {
			w.t.Errorf("beyond the mesh: %v", err)
		}
		w.listen(w.pod, netip.AddrPortFrom(f.pod, 8080))
		if _, err := w.connect(w.pod, netip.AddrPortFrom(f.pod, 8080), nil); err != nil {
			w.t.Errorf("to its own address: %v", err)
		}
		w.must(w.redirected.Probe(w.t.Context()))
		w.must(w.redirected.Carry())
		n := w.counted(func() {
			if _, err := w.connect(w.pod, to, nil); err != nil {
				w.t.Errorf("after Carry: %v", err)
			}
		})
		if n["connect_carried"] != 1 { // the control
			w.t.Errorf("counted %v", n)
		}
	})
}

// A pod with an address of one family only has no route to lo in the other: its
// mark alone would not keep the connection inside.
func TestOtherFamilyIsRefused(t *testing.T) {
	w := newWorld(t)
	var err error
	w.node, err = redirect.Open(w.cfg)
	w.must(err)
	w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{outside6: redirect.DestinationHBONE}))
	cfg := w.podConfig()
	cfg.Addrs = []netip.Addr{pod4}
	p, err := w.node.AddPod(t.Context(), cfg)
	w.must(err)
	w.must(p.Enrol())
	w.must(p.Carry())
	out := w.listen(w.outside, netip.MustParseAddrPort("[::]:8080"))
	n := w.counted(func() {
		if _, err := w.connect(w.pod, at(outside6, 8080), nil); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connect: %v", err)
		}
	})
	if n["connect_refused_no_address"] != 1 || pending(out) {
		t.Errorf("counted %v", n)
	}
}

// A socket that was carried and connects again, elsewhere, is not routed as if
// it still were.
func TestReconnectClearsTheMark(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		out := w.listen(w.outside, at(f.any, 8080))
		for name, prepare := range map[string]func(int) error{"plain": nil, "bound to eth0": bindToEth0} {
			fd, err := w.connect(w.pod, at(f.remote, 8080), prepare)
			w.must(err)
			w.accept(w.listeners[f.outbound])
			n := w.counted(func() {
				w.in(w.pod, func() error {
					// Disconnect: AF_UNSPEC.
					unspec := unix.RawSockaddrInet4{Family: unix.AF_UNSPEC}
					if err := disconnect(fd, &unspec); err != nil {
						return err
					}
					return finish(fd, unix.Connect(fd, sockaddr(at(f.outside, 8080))))
				})
				w.exchange(fd, w.accept(out))
			})
			if n["connect_mark_cleared"] != 1 || n["connect_outside"] != 1 {
				w.t.Errorf("%s: counted %v", name, n)
			}
		}
	})
}

// While no daemon has a listener, what is captured is refused at once.
func TestWithoutListenersConnectionsAreRefused(t *testing.T) {
	w := newWorld(t)
	w.start()
	for _, fd := range w.listeners {
		unix.Close(fd)
	}
	clear(w.listeners)
	w.listen(w.pod, netip.MustParseAddrPort("0.0.0.0:8080")) // not to be mistaken for the remote one
	n := w.counted(func() {
		for _, dst := range []netip.AddrPort{at(remote4, 8080), at(remote6, 8080), at(mapped(remote4), 8080)} {
			start := time.Now()
			if _, err := w.connect(w.pod, dst, nil); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("connect to %s: %v", dst, err)
			}
			if d := time.Since(start); d > atOnce() {
				t.Errorf("refused after %v", d)
			}
		}
		for _, dst := range []netip.AddrPort{at(pod4, 15008), at(pod6, 15008)} {
			if _, err := w.connect(w.outside, dst, nil); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("connect to %s: %v", dst, err)
			}
		}
	})
	if n["connect_refused_no_listener"] != 3 || n["steer_dropped_no_listener"] != 2 {
		t.Errorf("counted %v", n)
	}
}

// A destination that has gone since connect() is not taken by the pod's own
// wildcard listener, but by the tunnel's, which refuses it.
func TestGoneDestinationIsTheTunnels(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		l := w.listen(w.pod, at(f.any, 8080))
		w.must(w.node.SetMeshCIDRs(append(prefixes("10.98.0.0/16"), prefixes("fd98::/16")...)))
		for what, d := range map[string]map[netip.Addr]redirect.Destination{
			"unknown":   nil,
			"plaintext": {f.remote: redirect.DestinationTCP},
			"dead":      {f.remote: redirect.DestinationRefuse},
		} {
			w.must(w.node.SetDestinations(d))
			// What a SYN of before would do: marked, to an address that is gone.
			// Only the tunnel's own sockets can still be marked.
			n := w.counted(func() {
				fd, err := w.maker.Dial(w.pod, f.pod)
				w.must(err)
				w.closing(fd)
				w.must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x53a))
				w.must(finish(fd, unix.Connect(fd, sockaddr(at(f.remote, 8080)))))
				if c := w.accept(w.listeners[f.outbound]); local(c) != at(f.remote, 8080) {
					t.Errorf("%s: the tunnel sees the destination %s", what, local(c))
				}
			})
			if n["steer_unknown"] != 1 || pending(l) {
				t.Errorf("%s: counted %v", what, n)
			}
		}
	})
}

// MPTCP sockets pass the connect hooks by: there are none in a pod.
func TestMPTCPIsOff(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.in(w.pod, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
		if err == nil {
			unix.Close(fd)
			t.Error("the pod can make MPTCP sockets")
		}
		return nil
	})
}

// On lo the cheapest congestion control will do, at both ends and whatever the system
// or the application has chosen; between machines it is the system's.
func TestCongestionControl(t *testing.T) {
	allowed, err := os.ReadFile("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
	if err != nil {
		t.Fatal(err)
	}
	others := slices.DeleteFunc(strings.Fields(string(allowed)), func(s string) bool { return s == "reno" })
	if len(others) == 0 {
		t.Skip("this kernel has reno alone")
	}
	other := others[0]
	both(t, func(w *world, f family) {
		w.in(w.pod, func() error {
			return os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte(other), 0o644)
		})
		w.start()
		want := func(what, name string, fds ...int) {
			w.t.Helper()
			for i, fd := range fds {
				got, err := unix.GetsockoptString(fd, unix.SOL_TCP, unix.TCP_CONGESTION)
				w.must(err)
				if got != name {
					w.t.Errorf("%s, end %d: %s, want %s", what, i, got, name)
				}
			}
		}
		for _, prepare := range []func(int) error{nil, func(fd int) error {
			return unix.SetsockoptString(fd, unix.SOL_TCP, unix.TCP_CONGESTION, other)
		}} {
			fd, err := w.connect(w.pod, at(f.remote, 8080), prepare)
			w.must(err)
			want("a carried connection", "reno", fd, w.accept(w.listeners[f.outbound]))
		}
		app := w.listen(w.pod, at(f.pod, 8080))
		stock := w.maker.Stock(w.pod)
		defer stock.Close()
		fd := w.take(stock, f.v6)
		w.must(deliver(fd, f.outside, at(f.pod, 8080)))
		want("a delivery", "reno", fd, w.accept(app))
		_, err := w.connect(w.outside, at(f.pod, 15008), nil)
		w.must(err)
		want("a tunnel's end", other, w.accept(w.listeners[f.hbone]))
	})
}
