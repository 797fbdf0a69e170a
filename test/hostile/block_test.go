// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// block is what an attacker has who is not one address: each session that breaks the
// rules has its address wait for a second, and this many do not run out.
var block = netip.MustParsePrefix("10.77.192.0/23")

// addresses are those of a block, in turn.
type addresses struct {
	all []netip.Addr
	n   *atomic.Uint64
}

func newAddresses(prefix string) (a addresses, err error) {
	if prefix == "" {
		return a, nil
	}
	p, err := netip.ParsePrefix(prefix)
	if err != nil {
		return a, err
	}
	for at := p.Addr(); p.Contains(at); at = at.Next() {
		a.all = append(a.all, at)
	}
	a.n = new(atomic.Uint64)
	a.n.Store(rand.Uint64N(uint64(len(a.all)))) // not those of the last attacker
	return a, nil
}

// next is the next one; not valid: there is no block.
func (a addresses) next() netip.Addr {
	if len(a.all) == 0 {
		return netip.Addr{}
	}
	return a.all[a.n.Add(1)%uint64(len(a.all))]
}

// give has a pod of the first node take what goes to the block, and answer from it.
func give(to *lab.Pod, other *lab.Node) error {
	network := &net.IPNet{IP: block.Addr().AsSlice(), Mask: net.CIDRMask(block.Bits(), 32)}
	route := func(device string, r netlink.Route) error {
		link, err := netlink.LinkByName(device)
		if err == nil {
			r.LinkIndex, r.Dst = link.Attrs().Index, network
			err = netlink.RouteAdd(&r)
		}
		if err != nil {
			return fmt.Errorf("add route to %s by %s: %w", block, device, err)
		}
		return nil
	}
	by := func(gateway netip.Addr) netlink.Route {
		return netlink.Route{Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
	}
	if err := to.NS.Do(func() error {
		return route("lo", netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST})
	}); err != nil {
		return err
	}
	if err := to.Node.NS.Do(func() error { return route(to.HostEnd(), by(to.Addr(4))) }); err != nil {
		return err
	}
	return other.NS.Do(func() error { return route(other.Uplink(to.Node), by(to.Node.Addrs[0])) })
}
