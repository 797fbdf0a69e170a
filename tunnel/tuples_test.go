// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net/netip"
	"testing"
)

func TestTuples(t *testing.T) {
	client, other := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	local := netip.MustParseAddrPort("10.0.0.2:8080")
	beside := netip.MustParseAddrPort("10.0.0.2:8081")
	p := &Pod{}
	avoided := func(c netip.Addr, l netip.AddrPort, port uint16) bool {
		avoid := p.tuples.avoid(c, l)
		return avoid != nil && avoid(port)
	}
	if p.tuples.avoid(client, local) != nil {
		t.Error("an empty set asks for the lock")
	}
	at := netip.AddrPortFrom(client, 20000)
	p.HoldTuple(at, local)
	p.HoldTuple(at, local) // accepted again before the first one's end was told
	p.DropTuple(at, local)
	if !avoided(client, local, 20000) {
		t.Error("a tuple that is held once more is not avoided")
	}
	if avoided(client, local, 20001) || avoided(client, beside, 20000) || avoided(other, local, 20000) {
		t.Error("another tuple is avoided")
	}
	p.DropTuple(at, local)
	p.DropTuple(at, local) // once too often
	if avoided(client, local, 20000) || p.tuples.avoid(client, local) != nil || len(p.tuples.held) != 0 {
		t.Error("a tuple that was dropped is still held")
	}
}
