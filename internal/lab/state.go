// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// watched are the sysctls that a daemon may change in a pod.
var watched = [...]string{
	"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect", "mptcp/enabled",
	"ipv4/ip_local_port_range", "ipv4/tcp_migrate_req", "ipv4/ip_nonlocal_bind", "ipv4/conf/all/route_localnet",
	"ipv4/conf/lo/rp_filter", "ipv4/conf/all/rp_filter", "ipv4/conf/lo/accept_local", "ipv4/conf/all/src_valid_mark",
}

// readSysctls reads those of the calling thread's network namespace. What this kernel lacks is left out.
func readSysctls() (map[string]string, error) {
	out := make(map[string]string)
	for _, key := range watched {
		b, err := os.ReadFile(filepath.Join("/proc/sys/net", key))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[key] = strings.TrimSpace(string(b))
	}
	return out, nil
}

// State lists what there is in a pod that only a daemon of the node makes: policy rules, routes of other tables than
// main and local, sysctls with another value than at first, and BPF links of the pod's network namespace. One thing a
// line; empty: nothing, as it was before any daemon.
func (n *Node) State(p *Pod) string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	err := p.NS.Do(func() error {
		rules, err := netlink.RuleList(netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list rules: %w", err)
		}
		for _, r := range rules {
			if r.Table != unix.RT_TABLE_LOCAL && r.Table != unix.RT_TABLE_MAIN && r.Table != unix.RT_TABLE_DEFAULT || r.Mark != 0 {
				add("rule: %s", r)
			}
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Table != unix.RT_TABLE_LOCAL && r.Table != unix.RT_TABLE_MAIN {
				add("route: %s", r)
			}
		}
		now, err := readSysctls()
		for key, value := range now {
			if value != p.fresh[key] {
				add("sysctl %s: %s, was %s", key, value, p.fresh[key])
			}
		}
		return err
	})
	if err != nil {
		add("error: %v", err)
	}
	if err := namespaceLinks(p.NetnsPath(), add); err != nil {
		add("error: %v", err)
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

// namespaceLinks adds the BPF links that are attached to a network namespace.
func namespaceLinks(path string, add func(string, ...any)) error {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return fmt.Errorf("find namespace: %w", err)
	}
	var it link.Iterator
	defer it.Close()
	for it.Next() {
		info, err := it.Link.Info()
		if err != nil {
			return fmt.Errorf("read link: %w", err)
		}
		if ns := info.NetNs(); ns != nil && uint64(ns.NetnsInode) == stat.Ino {
			add("link: id %d, program %d, attach type %d", info.ID, info.Program, ns.AttachType)
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	return nil
}
