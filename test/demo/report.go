// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/culvert-mesh/culvert/internal/cli"
	"github.com/culvert-mesh/culvert/internal/lab"
)

func httpLabel(family int) string { return fmt.Sprintf("web's client, IPv%d", family) }
func mailLabel(family int) string { return fmt.Sprintf("mail spoke first, IPv%d", family) }

// report prints what holds and what does not.
func (s *stage) report(ctx context.Context, r *cli.Report, off, on outcome, daemons error) {
	if daemons != nil {
		r.Section("A ztunnel on each node")
		r.Check(false, "both are ready", "%v", daemons)
		return
	}
	r.Section("What the applications saw")
	for _, family := range families {
		s.reportHTTP(r, family, on)
	}
	for _, family := range families {
		s.reportMail(r, family, on)
	}
	s.reportLogs(ctx, r)
	s.reportWire(r, off, on)
}

func (s *stage) reportHTTP(r *cli.Report, family int, on outcome) {
	label := httpLabel(family)
	if err := on.errs[label]; err != nil {
		r.Check(false, label, "%v", err)
		return
	}
	want, seen := s.shop.Addr(family), on.clients[family]
	if i := slices.IndexFunc(seen, func(a netip.Addr) bool { return a != want }); i >= 0 {
		r.Check(false, label, "%s, and shop is %s", seen[i], want)
		return
	}
	r.Check(len(seen) == requests, label, "%s, which is shop: %d of %d requests, %s and back each",
		want, len(seen), requests, cli.Bytes(bodySize))
}

func (s *stage) reportMail(r *cli.Report, family int, on outcome) {
	label := mailLabel(family)
	if err := on.errs[label]; err != nil {
		r.Check(false, label, "%v", err)
		return
	}
	// mail names its client in its greeting; the port is one of the far ztunnel's choice.
	var seen netip.AddrPort
	greeting := on.greetings[family]
	if i := strings.LastIndexByte(greeting, ' '); i >= 0 {
		seen, _ = netip.ParseAddrPort(greeting[i+1:])
	}
	want := s.batch.Addr(family)
	r.Check(strings.HasPrefix(greeting, "220 mail ") && seen.Addr() == want, label, "%q; batch is %s", greeting, want)
}

// side is what one daemon's access log says of the demo's connections.
type side struct {
	daemon     *lab.Daemon
	direction  string
	entries    []lab.Entry
	handshakes int
	err        error
}

// reportLogs holds the two access logs against each other, and against the metrics.
func (s *stage) reportLogs(ctx context.Context, r *cli.Report) {
	r.Section("What both daemons recorded")
	want := len(families) * (requests + 1)
	sides := []*side{
		{daemon: s.daemons[0], direction: "outbound"},
		{daemon: s.daemons[1], direction: "inbound"},
	}
	for _, x := range sides {
		x.read(ctx, want)
		if x.err != nil {
			r.Check(false, x.daemon.Node.Name+"'s access log", "%v", x.err)
			return
		}
	}
	source, destination := sides[0], sides[1]

	for _, pair := range [][2]*lab.Pod{{s.shop, s.web}, {s.batch, s.mail}} {
		from, to := pair[0], pair[1]
		seen := func(x *side, field string) string {
			return x.values(field, func(e lab.Entry) bool { return e.String("dst.workload") == to.Name || isAddr(e.String("dst.addr"), to) })
		}
		label := fmt.Sprintf("%s ▸ %s", from.Name, to.Name)
		good := true
		for _, x := range sides {
			good = good && seen(x, "src.identity") == from.Identity() && seen(x, "dst.identity") == to.Identity()
		}
		if good {
			r.Check(true, label, "%s ▸ %s", from.Identity(), to.Identity())
			continue
		}
		for _, x := range sides {
			r.Check(false, label, "%s says %s ▸ %s", x.daemon.Node.Name, seen(x, "src.identity"), seen(x, "dst.identity"))
		}
	}
	tls := func(x *side) string {
		return fmt.Sprintf("TLS %s, %s, %s; %s", x.values("tls.version", nil), x.values("tls.cipher", nil),
			x.values("tls.group", nil), x.values("connection_security_policy", nil))
	}
	good := strings.HasPrefix(tls(source), "TLS 1.3, TLS_") && strings.HasSuffix(tls(source), "; mutual_tls") && tls(source) == tls(destination)
	if good {
		r.Check(true, "protected by", "%s, say both", tls(source))
	} else {
		r.Check(false, "protected by", "%s; and at the other end %s", tls(source), tls(destination))
	}
	reasons := source.values("reason", nil)
	r.Check(len(source.entries) == want && len(destination.entries) == want && reasons == "ok" && destination.values("reason", nil) == "ok",
		"connections", "%d at %s (%s), %d at %s (%s), of %d made",
		len(source.entries), source.daemon.Node.Name, reasons,
		len(destination.entries), destination.daemon.Node.Name, destination.values("reason", nil), want)
	// Each pair of pods and each family has a session of its own.
	sessions := 2 * len(families)
	r.Check(source.handshakes == sessions && destination.handshakes == sessions,
		"handshakes for them", "%d at %s, %d at %s: one for each pair of addresses",
		source.handshakes, source.daemon.Node.Name, destination.handshakes, destination.daemon.Node.Name)
}

func isAddr(text string, p *lab.Pod) bool {
	a, err := netip.ParseAddrPort(text)
	return err == nil && slices.Contains(p.Addrs(), a.Addr())
}

// read waits for the lines of the connections; a line is written when its connection ends, which both ends of a
// session learn a moment after the applications.
func (x *side) read(ctx context.Context, want int) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	x.entries, x.err = x.daemon.WaitAccessLog(ctx, want, func(e lab.Entry) bool { return e.String("direction") == x.direction })
	if x.err != nil {
		return
	}
	var m lab.Metrics
	if m, x.err = x.daemon.Metrics(ctx); x.err == nil {
		x.handshakes = int(m.Sum("mtls_handshake_success_total"))
	}
}

// values returns the different values that a field has in the matching lines; one, when all agree.
func (x *side) values(field string, match func(lab.Entry) bool) string {
	var out []string
	for _, e := range x.entries {
		if match != nil && !match(e) {
			continue
		}
		v := e.String(field)
		if v == "" {
			v = "nothing"
		}
		if !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	if len(out) == 0 {
		return "nothing"
	}
	return strings.Join(out, " and ")
}

// reportWire shows the capture's counters with the mesh on beside those of the same traffic with the mesh off, which
// show that it would have seen what it did not see.
func (s *stage) reportWire(r *cli.Report, off, on outcome) {
	r.Section("What an independent capture saw between the nodes")
	columns := func(on, off any) string { return fmt.Sprintf("%12v  %12v", on, off) }
	r.Info("", "%s", columns("mesh on", "mesh off"))
	if err := on.wireErr; err != nil {
		r.Check(false, "the capture is whole", "%v", err)
	}
	if err := off.wireErr; err != nil {
		r.Check(false, "the capture is whole, mesh off", "%v", err)
	}
	for label, err := range off.errs {
		r.Check(false, label+", mesh off", "%v", err)
	}
	line := func(ok bool, label, note string, on, off any) {
		r.Check(ok, label, "%s", strings.TrimRight(columns(on, off)+"  "+note, " "))
	}
	note := "none on any port but 15008"
	if on.plain > 0 {
		note = "the first: " + on.firstPlain
	}
	line(on.plain == 0 && off.plain > 0, "segments with payload, pod to pod", note, on.plain, off.plain)
	line(on.tunnel > on.transfer && on.transfer > 0 && off.tunnel == 0, "bytes on port 15008",
		fmt.Sprintf("more than the applications' %d", on.transfer), on.tunnel, off.tunnel)
	line(on.marker == 0 && off.marker > 0, "the clients' secret in plaintext", "times", on.marker, off.marker)
	line(on.unreadable == 0 && off.unreadable == 0, "frames that could not be read", "", on.unreadable, off.unreadable)
}
