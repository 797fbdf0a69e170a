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

	"github.com/culvert-mesh/culvert/redirect"
)

// carriedAgain waits until the pod's connections reach the tunnel as its own.
func (w *world) carriedAgain(f family, what string) {
	w.t.Helper()
	var err error
	for deadline := time.Now().Add(20 * patience); time.Now().Before(deadline); {
		if err = w.redirected.Probe(w.t.Context()); err == nil {
			break
		}
	}
	if err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
	for pending(w.listeners[f.outbound]) { // probes
		w.accept(w.listeners[f.outbound])
	}
	fd, err := w.connect(w.pod, at(f.remote, 8080), nil)
	w.must(err)
	c := w.accept(w.listeners[f.outbound])
	if peer(c).Addr() != f.pod || local(c) != at(f.remote, 8080) {
		w.t.Errorf("%s: the tunnel sees %s and %s", what, peer(c), local(c))
	}
	w.exchange(fd, c)
}

// delAddr takes an address from eth0, on a thread in the namespace.
func delAddr(a netip.Addr) error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(netip.PrefixFrom(a, a.BitLen()-8).String())
	if err != nil {
		return err
	}
	return netlink.AddrDel(link, addr)
}

// An address that goes takes its route along: nothing leaves meanwhile, and with
// the address the route comes again. So does what somebody has removed.
func TestRoutesAreHealed(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{f.remote: redirect.DestinationHBONE, f.outside: redirect.DestinationHBONE}))
		out := w.listen(w.outside, at(f.outside, 8080))
		w.carriedAgain(f, "before")
		w.in(w.pod, func() error { return delAddr(f.pod) })
		// Whether the route goes with it depends on the kernel.
		t.Logf("without the address: %v", w.redirected.Probe(t.Context()))
		if fd, err := w.connect(w.pod, at(f.outside, 8080), nil); err == nil && peer(fd).Addr() == f.outside && pending(out) {
			t.Error("a connection has left")
		}
		w.empty(out)
		w.in(w.pod, func() error { return addAddr("eth0", f.pod) })
		w.carriedAgain(f, "with the address again")

		nl := unix.AF_INET
		if f.v6 {
			nl = unix.AF_INET6
		}
		w.in(w.pod, func() error {
			rules, err := netlink.RuleListFiltered(nl, &netlink.Rule{Table: 0x53a}, netlink.RT_FILTER_TABLE)
			if err != nil || len(rules) != 1 {
				return fmt.Errorf("our rule: %v, %w", rules, err)
			}
			rules[0].Family = nl
			return netlink.RuleDel(&rules[0])
		})
		w.carriedAgain(f, "without the rule")
		w.in(w.pod, func() error {
			routes, err := netlink.RouteListFiltered(nl, &netlink.Route{Table: 0x53a}, netlink.RT_FILTER_TABLE)
			if err != nil || len(routes) != 2 {
				return fmt.Errorf("our routes: %v, %w", routes, err)
			}
			return errors.Join(netlink.RouteDel(&routes[0]), netlink.RouteDel(&routes[1]))
		})
		w.carriedAgain(f, "without the routes")

		// lo takes all with it that leads to it.
		w.in(w.pod, func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetDown(lo), netlink.LinkSetUp(lo))
		})
		w.carriedAgain(f, "with lo again")
	})
}

// The device that holds the address is another one by now: its undeclared
// addresses are no way in either.
func TestDeviceIsFollowed(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		w.listen(w.pod, at(f.any, 8080))
		w.in(w.pod, func() error {
			old, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			if err := netlink.LinkDel(old); err != nil {
				return err
			}
			// An index that the old one had not.
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Index: 77}, PeerName: "eth0", PeerNamespace: netlink.NsFd(w.outside.FD())})
		})
		w.in(w.pod, func() error { return setUpEth0(pod4, pod6, outside4, outside6) })
		w.in(w.outside, func() error { return setUpEth0(outside4, outside6, pod4, pod6) })
		w.carriedAgain(f, "with another device")
		extra := netip.MustParseAddr("10.99.0.101")
		if f.v6 {
			extra = netip.MustParseAddr("fd99::101")
		}
		w.in(w.pod, func() error { return addAddr("eth0", extra) })
		var err error
		for deadline := time.Now().Add(5 * patience); time.Now().Before(deadline); {
			if _, err = w.connect(w.outside, at(extra, 8080), nil); errors.Is(err, unix.ECONNREFUSED) {
				break
			}
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("an undeclared address of the new device from outside: %v", err)
		}
		w.refused("the mesh address", func() error { _, err := w.connect(w.outside, at(f.pod, 8080), nil); return err })
	})
}
