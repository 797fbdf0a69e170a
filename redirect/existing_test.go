// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/redirect"
)

// give gives the outside another address.
func (w *world) give(a netip.Addr) {
	w.t.Helper()
	w.in(w.outside, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Flags: unix.IFA_F_NODAD})
	})
}

// pair makes a connection: the client's descriptor, and the accepted one.
func (w *world) pair(from *netns.NS, src netip.Addr, in *netns.NS, dst netip.AddrPort) (client, server int) {
	w.t.Helper()
	l := w.listen(in, dst)
	client, err := w.connect(from, dst, func(fd int) error {
		if !src.IsValid() {
			return nil
		}
		return unix.Bind(fd, sockaddr(at(src, 0)))
	})
	w.must(err)
	return client, w.accept(l)
}

// found says what is found, as the pod sees it: direction and both addresses.
func (w *world) found() []string {
	w.t.Helper()
	all, err := w.redirected.Existing()
	w.must(err)
	var out []string
	for _, e := range all {
		direction := "outbound"
		if e.Inbound {
			direction = "inbound"
		}
		out = append(out, fmt.Sprintf("%s %s %s", direction, e.Local, e.Remote))
	}
	slices.Sort(out)
	return out
}

// Each connection from before the enrolment that touches the mesh is found, by a
// later process too, and none that the tunnel carries or that is none of its
// business.
func TestExistingConnections(t *testing.T) {
	for _, tt := range []struct {
		name                        string
		pod, outside, mesh, nowhere netip.Addr
	}{
		{"v4", pod4, outside4, remote4, netip.MustParseAddr("10.98.0.9")},
		{"v6", pod6, outside6, remote6, netip.MustParseAddr("fd98::9")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.give(tt.mesh)
			want := []string{}
			expect := func(direction string, fd int) {
				want = append(want, fmt.Sprintf("%s %s %s", direction, local(fd), peer(fd)))
			}
			out, outPeer := w.pair(w.pod, netip.Addr{}, w.outside, at(tt.mesh, 8080))
			expect("outbound", out)
			_, in := w.pair(w.outside, tt.mesh, w.pod, at(tt.pod, 7070))
			expect("inbound", in)
			_, stranger := w.pair(w.outside, netip.Addr{}, w.pod, at(tt.pod, 7071))
			expect("inbound", stranger)
			kept, keptPeer := w.pair(w.pod, netip.Addr{}, w.outside, at(tt.outside, 8081)) // beyond the mesh
			w.pair(w.pod, netip.Addr{}, w.pod, at(tt.pod, 7072))
			loopback := netip.MustParseAddr("127.0.0.1")
			if tt.pod.Is6() {
				loopback = netip.IPv6Loopback()
			}
			w.pair(w.pod, netip.Addr{}, w.pod, at(loopback, 7073))
			if tt.pod.Is4() {
				// A dual-stack client of an IPv4 address.
				l := w.listen(w.outside, at(tt.mesh, 8082))
				mapped, err := w.connect(w.pod, netip.AddrPortFrom(netip.AddrFrom16(tt.mesh.As16()), 8082), nil)
				w.must(err)
				w.accept(l)
				expect("outbound", mapped)
			}
			// One that is being made.
			var trying int
			w.in(w.pod, func() (err error) {
				if trying, err = tcp(tt.pod.Is6()); err != nil {
					return err
				}
				if err := unix.SetNonblock(trying, true); err != nil {
					return err
				}
				if err := unix.Connect(trying, sockaddr(at(tt.nowhere, 8080))); !errors.Is(err, unix.EINPROGRESS) {
					return err
				}
				return nil
			})
			w.closing(trying)
			want = append(want, fmt.Sprintf("outbound %s %s", local(trying), at(tt.nowhere, 8080)))
			slices.Sort(want)

			start := func() {
				w.start()
				w.must(w.node.SetMeshCIDRs([]netip.Prefix{netip.PrefixFrom(tt.nowhere, tt.nowhere.BitLen())}))
			}
			start()
			check := func(when string) {
				t.Helper()
				if diff := cmp.Diff(want, w.found()); diff != "" {
					t.Errorf("%s: -want +found\n%s", when, diff)
				}
			}
			check("enrolled")

			// What the tunnel has: captured, taken from a peer (accepted or
			// not), dialled, delivered.
			carried, err := w.connect(w.pod, at(tt.mesh, 8080), nil)
			w.must(err)
			outbound, hbone := redirect.Outbound4, redirect.HBONE4
			if tt.pod.Is6() {
				outbound, hbone = redirect.Outbound6, redirect.HBONE6
			}
			w.exchange(carried, w.accept(w.listeners[outbound]))
			for range 2 {
				_, err := w.connect(w.outside, at(tt.pod, 15008), nil)
				w.must(err)
			}
			w.accept(w.listeners[hbone])
			far := w.listen(w.outside, at(tt.mesh, 15008))
			dialled, err := w.maker.Dial(w.pod, tt.pod)
			w.must(err)
			w.closing(dialled)
			if err := unix.Connect(dialled, sockaddr(at(tt.mesh, 15008))); !errors.Is(err, unix.EINPROGRESS) {
				w.must(err)
			}
			w.accept(far)
			app := w.listen(w.pod, at(tt.pod, 7074))
			stock := w.maker.Stock(w.pod)
			delivery := w.take(stock, tt.pod.Is6())
			w.must(stock.Close())
			w.must(deliver(delivery, tt.mesh, at(tt.pod, 7074)))
			w.must(limit(delivery))
			w.exchange(w.accept(app), delivery)
			check("beside those that are carried")

			w.must(w.stop())
			start()
			check("by the next process")

			// By configuration it is plaintext.
			all := slices.Clone(want)
			want = slices.DeleteFunc(want, func(s string) bool {
				return strings.HasSuffix(s, at(tt.mesh, 8080).String()) || strings.HasSuffix(s, at(tt.mesh, 8082).String())
			})
			w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{tt.mesh: redirect.DestinationTCP}))
			check("a workload that says tcp")
			w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{tt.mesh: redirect.DestinationHBONE}))
			w.must(w.node.SetBypass([]netip.Prefix{netip.PrefixFrom(tt.mesh, tt.mesh.BitLen())}))
			check("bypassed")
			w.must(w.node.SetBypass(nil))
			want = all
			check("neither")

			found, err := w.redirected.Existing()
			w.must(err)
			for _, e := range found {
				w.must(w.redirected.Reset(e))
			}
			b := make([]byte, 1)
			for _, fd := range []int{out, in, stranger} {
				if _, err := unix.Read(fd, b); !errors.Is(err, unix.ECONNABORTED) {
					t.Errorf("reset: its process reads %v", err)
				}
			}
			if _, err := unix.Read(outPeer, b); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("reset: its peer reads %v", err)
			}
			w.exchange(kept, keptPeer)
			want = []string{}
			if got := w.found(); len(got) != 0 {
				t.Errorf("found after the reset: %v", got)
			}
		})
	}
}
