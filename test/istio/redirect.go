// SPDX-License-Identifier: Apache-2.0

package istio

import (
	"fmt"
	"net"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// The marks and the table of Istio's rules in a pod: its packets that ztunnel has
// sent, its connections that ztunnel has made, and the routes for the latter's
// answers.
const (
	mark      = "0x539/0xfff"
	connMark  = 0x111
	markMask  = 0xfff
	table     = 100
	ruleOrder = 32764
)

// Redirect gives a pod the rules that istio-cni gives it in ambient mode. It needs
// iptables and ip6tables.
func Redirect(p *lab.Pod) error {
	ours := fmt.Sprintf("%#x/%#x", connMark, markMask)
	for _, family := range []struct {
		number   int
		command  string
		loopback string
		bits     int
	}{{unix.AF_INET, "iptables", "127.0.0.1/32", 8 * net.IPv4len}, {unix.AF_INET6, "ip6tables", "::1/128", 8 * net.IPv6len}} {
		for _, rule := range []string{
			"mangle -A PREROUTING -m mark --mark " + mark + " -j CONNMARK --set-xmark " + ours,
			"mangle -A OUTPUT -m connmark --mark " + ours + " -j CONNMARK --restore-mark",
			"nat -A PREROUTING ! -d " + family.loopback + " -p tcp ! --dport 15008 -m mark ! --mark " + mark + " -j REDIRECT --to-ports 15006",
			"nat -A OUTPUT -p tcp -m mark --mark " + ours + " -j ACCEPT",
			"nat -A OUTPUT ! -d " + family.loopback + " -o lo -j ACCEPT",
			"nat -A OUTPUT ! -d " + family.loopback + " -p tcp -m mark ! --mark " + mark + " -j REDIRECT --to-ports 15001",
		} {
			var out []byte
			err := p.Do(func() (err error) {
				out, err = exec.Command(family.command, append([]string{"-w", "-t"}, strings.Fields(rule)...)...).CombinedOutput()
				return err
			})
			if err != nil {
				return fmt.Errorf("redirect %s: %s %s: %w: %s", p.Name, family.command, rule, err, out)
			}
		}
		if err := p.Do(func() error { return routeAnswers(family.number, family.bits) }); err != nil {
			return fmt.Errorf("route in %s: %w", p.Name, err)
		}
	}
	return nil
}

// routeAnswers brings what answers a connection of the ztunnel back to it, whose
// address the connection does not have.
func routeAnswers(family, bits int) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	mask := uint32(markMask)
	rule := netlink.NewRule()
	rule.Family, rule.Mark, rule.Mask, rule.Table, rule.Priority = family, connMark, &mask, table, ruleOrder
	if err := netlink.RuleAdd(rule); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{
		LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)},
		Scope: unix.RT_SCOPE_HOST, Type: unix.RTN_LOCAL, Table: table, Family: family,
	})
}
