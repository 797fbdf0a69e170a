// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What is ours among rules and routes: table and mark (bpf/culvert.h), and the
// protocol number by which a release knows them. 83 is in no rt_protos file.
const (
	mark         = 0x53a
	table        = 0x53a
	protocol     = 83
	rulePriority = 83 // before main; behind local (0)
)

// loopback is lo's index in every namespace (include/net/flow.h).
const loopback = 1

func family(a netip.Addr) int {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// hasIPv6 says whether the calling thread's namespace has IPv6 at all.
func hasIPv6() bool {
	all, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err == nil && strings.TrimSpace(string(all)) == "0"
}

// dumps bounds how often a list is asked for.
const dumps = 32

// dump asks the kernel for a list again where it changed while it was read: what is
// there may be missing from such a one (NLM_F_DUMP_INTR).
func dump[T any](list func() ([]T, error)) ([]T, error) {
	all, err := list()
	for n := 1; n < dumps && errors.Is(err, netlink.ErrDumpInterrupted); n++ {
		all, err = list()
	}
	return all, err
}

// findAddr finds an address in the calling thread's namespace; nil: not there.
func findAddr(a netip.Addr) (*netlink.Addr, error) {
	all, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, family(a)) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, have := range all {
		if ip, ok := netip.AddrFromSlice(have.IP); ok && ip.Unmap() == a {
			return &have, nil
		}
	}
	return nil, nil
}

func anyPrefix(a netip.Addr) *net.IPNet {
	bits := a.BitLen()
	return &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}
}

// localRoute is `local default dev lo src <addr> congctl reno`: without src the
// destination would become the source address. There is no network on lo whose pace
// is to be found: BBR, where it is the machine's default, takes up to a tenth more CPU
// for bulk. The application's sockets take it from the route, those of ours on lo by
// themselves (redirect/socket).
func localRoute(a netip.Addr) *netlink.Route {
	return &netlink.Route{
		LinkIndex: loopback,
		Table:     table,
		Type:      unix.RTN_LOCAL,
		Scope:     netlink.SCOPE_HOST,
		Dst:       anyPrefix(a),
		Src:       a.AsSlice(),
		Protocol:  protocol,
		Family:    family(a),
		Congctl:   "reno",
	}
}

// lastMetric is behind the local route's (0; 1024 in IPv6).
const lastMetric = 1 << 20

// lastRoute is `unreachable default`: the local route goes with its address, and
// what has the mark would then leave by the main table, in plaintext. Its scope is
// the local route's: a wider one is passed over for sockets with SO_DONTROUTE.
func lastRoute(a netip.Addr) *netlink.Route {
	return &netlink.Route{
		Table:    table,
		Type:     unix.RTN_UNREACHABLE,
		Scope:    netlink.SCOPE_HOST,
		Dst:      anyPrefix(a),
		Priority: lastMetric,
		Protocol: protocol,
		Family:   family(a),
	}
}

func rule(a netip.Addr) *netlink.Rule {
	r := netlink.NewRule()
	mask := uint32(0xffffffff)
	r.Mark, r.Mask = mark, &mask
	r.Table = table
	r.Priority = rulePriority
	r.Family = family(a)
	r.Protocol = protocol
	return r
}

// addRouting sends what has the mark to lo, on a thread in the namespace. What
// is there already stays.
func addRouting(a netip.Addr) error {
	for _, r := range []*netlink.Route{lastRoute(a), localRoute(a)} {
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("add route for %s: %w", a, err)
		}
	}
	if err := netlink.RuleAdd(rule(a)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add rule for %s: %w", a, err)
	}
	return nil
}

// removeRouting removes what is ours, and nothing else.
func removeRouting(a netip.Addr) (report []string, err error) {
	var errs []error
	rules, err := dump(func() ([]netlink.Rule, error) { return netlink.RuleList(family(a)) })
	if err != nil {
		errs = append(errs, fmt.Errorf("list rules: %w", err))
	}
	for _, r := range rules {
		if r.Protocol != protocol || r.Table != table {
			continue
		}
		r.Family = family(a)
		if err := netlink.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove rule: %w", err))
			continue
		}
		report = append(report, fmt.Sprintf("rule %d of IPv%d removed", r.Priority, ipVersion(a)))
	}
	routes, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family(a), &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		errs = append(errs, fmt.Errorf("list routes: %w", err))
	}
	for _, r := range routes {
		if r.Protocol != protocol {
			continue
		}
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route: %w", err))
			continue
		}
		report = append(report, fmt.Sprintf("%s route of IPv%d in table %d removed", routeKind(r.Type), ipVersion(a), table))
	}
	return report, errors.Join(errs...)
}

func routeKind(t int) string {
	if t == unix.RTN_UNREACHABLE {
		return "unreachable"
	}
	return "local"
}

func ipVersion(a netip.Addr) int {
	if a.Is6() {
		return 6
	}
	return 4
}
