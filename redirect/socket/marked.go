// SPDX-License-Identifier: Apache-2.0

package socket

import (
	"net/netip"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

// MarkedListener looks for the application's listener that takes what is
// delivered to dst, and finds it if it has a mark of its own: what it accepts has
// that mark and not the delivery's, so that its answers do not return over lo.
func MarkedListener(ns *netns.NS, dst netip.AddrPort) (l sockdiag.Socket, found bool, err error) {
	all, err := sockdiag.List(ns, sockdiag.Listening)
	if err != nil {
		return l, false, err
	}
	l, found = marked(all, dst)
	return l, found, nil
}

// marked chooses as the kernel does: the more exact address first. Of a group
// that shares the port, one with a mark is enough.
func marked(listeners []sockdiag.Socket, dst netip.AddrPort) (l sockdiag.Socket, found bool) {
	best := 0
	for _, s := range listeners {
		exact := 0
		switch a := s.Local.Addr(); {
		case s.Local.Port() != dst.Port():
		case a == dst.Addr():
			exact = 3
		case a.IsUnspecified() && a.Is4() == dst.Addr().Is4():
			exact = 2
		case a.IsUnspecified() && a.Is6(): // perhaps of both families
			exact = 1
		}
		foreign := s.Mark != 0 && s.Mark != carriedMark
		if exact > best || exact == best && exact > 0 && foreign {
			best, l, found = exact, s, foreign
		}
	}
	return l, found
}
