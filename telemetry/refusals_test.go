// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func refusedTo(port int, reason Reason) *Connection {
	return &Connection{
		Src:    Endpoint{Addr: netip.MustParseAddrPort("10.0.0.1:4000")},
		Dst:    Endpoint{Addr: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), uint16(port))},
		Start:  time.Unix(1000, 0),
		Reason: reason,
	}
}

func TestRefusalsThatAreAlikeAreOne(t *testing.T) {
	var r Refusals
	first := refusedTo(80, ReasonDenied)
	first.Detail = strings.Repeat("x", 2*maxDetail)
	r.Record(first)
	again := refusedTo(80, ReasonDenied)
	again.Src.Addr = netip.MustParseAddrPort("10.0.0.1:4001")
	again.Duration, again.Detail = time.Second, "later"
	r.Record(refusedTo(81, ReasonTimeout))
	r.Record(again)
	for _, ended := range []Reason{ReasonOK, ReasonReset} { // by the applications
		r.Record(refusedTo(82, ended))
	}
	kept, total := r.List()
	if total != 3 || len(kept) != 2 {
		t.Fatalf("%d kept of %d", len(kept), total)
	}
	if k := kept[0]; k.Times != 2 || k.Detail != "later" || k.Src.Addr.Port() != 4001 || !k.Last.Equal(time.Unix(1001, 0)) {
		t.Errorf("the latest is %+v", k)
	}
	if k := kept[1]; k.Times != 1 || k.Reason != ReasonTimeout {
		t.Errorf("the one before it is %+v", k)
	}
	for _, other := range []func(*Connection){
		func(c *Connection) { c.Src.Addr = netip.MustParseAddrPort("10.0.0.9:4000") },
		func(c *Connection) { c.Reason = ReasonLimit },
		func(c *Connection) { c.Rule = "rule" },
		func(c *Connection) { c.Direction++ },
	} {
		c := refusedTo(80, ReasonDenied)
		other(c)
		r.Record(c)
	}
	if kept, _ := r.List(); len(kept) != 6 {
		t.Errorf("%d are kept: they are not alike", len(kept))
	}
	var cut Refusals
	cut.Record(first)
	if kept, _ := cut.List(); len(kept[0].Detail) > maxDetail+len("…") {
		t.Errorf("a detail of %d bytes is kept", len(kept[0].Detail))
	}
}

func TestRefusalsAreBounded(t *testing.T) {
	var r Refusals
	for port := range maxRefusals + 10 {
		r.Record(refusedTo(port+1, ReasonDenied))
		r.Record(refusedTo(1, ReasonDenied)) // always among the latest
	}
	kept, total := r.List()
	if len(kept) != maxRefusals || len(r.known) != maxRefusals || total != 2*(maxRefusals+10) {
		t.Fatalf("%d kept, %d known, of %d", len(kept), len(r.known), total)
	}
	ports := map[string]bool{}
	for _, k := range kept {
		ports[fmt.Sprint(k.Dst.Addr.Port())] = true
	}
	if !ports["1"] || ports["2"] || !ports[fmt.Sprint(maxRefusals+10)] {
		t.Error("it is not the oldest that went")
	}
	if kept[0].Times != maxRefusals+11 {
		t.Errorf("the busiest has %d", kept[0].Times)
	}
}
