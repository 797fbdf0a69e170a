// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

func networkChecks() []Check {
	return []Check{
		{
			Name: "network namespaces", run: namespaces, AtStart: true, after: []string{"capabilities"},
			Why:     "the tunnel's sockets are made in the pods' own",
			Without: "ztunnel does not start",
			Mend:    "run a kernel with CONFIG_NET_NS (Linux 5.14 or newer), with a seccomp profile that allows setns(2) and unshare(2)",
		},
		{
			Name: "policy routing", run: policyRouting, AtStart: true, after: []string{"network namespaces"},
			Why:     "a rule sends what is marked to lo",
			Without: "no pod is enrolled",
			Mend:    "run a kernel with CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES",
		},
		{
			Name: "sysctls", run: sysctls, AtStart: true, after: []string{"network namespaces"},
			Why:     "answers and resets of applications return over lo; MPTCP is switched off",
			Without: "no pod is enrolled",
			Mend:    "let /proc/sys be written (a privileged container), on a kernel that has them",
		},
		{
			Name: "IPv6", run: ipv6, AtStart: true, after: []string{"network namespaces"},
			Why:     "pods with addresses of IPv6",
			Without: "only the IPv4 address of a pod is carried; one that has no other is not enrolled",
			Mend:    "where pods are to have it: boot without ipv6.disable=1, and set net.ipv6.conf.all.disable_ipv6=0",
		},
		{
			Name: "socket diagnosis", run: diagnosis, after: []string{"network namespaces"},
			Why:     "connections from before an enrolment are listed, or reset; deliveries keep clear of them",
			Without: "they go on in plaintext, unseen, or cannot be reset",
			Mend:    "run a kernel with CONFIG_INET_DIAG and CONFIG_INET_DIAG_DESTROY (where it is a module: `modprobe tcp_diag`)",
		},
		{
			Name: "metrics address", run: metricsAddress,
			Why:     "metrics and readiness are served there",
			Without: "ztunnel does not start",
			Mend:    "set metrics.address to a free one, or stop who has it",
		},
		{
			Name: "other programs", run: otherPrograms, after: []string{"capabilities", "bpf", "cgroup"},
			Why:     "a load balancer in sockets gives connections another destination",
			Without: "a pod's connection may go elsewhere than was decided, in plaintext",
			Mend:    redirect.ForeignMend,
		},
		{
			Name: "kernel limits", run: kernelLimits, after: []string{"network namespaces"},
			Why:     "queues of listeners, and ports of clients",
			Without: "bursts of connections meet full queues; a delivery may meet a client's own port",
			Mend:    "set net.core.somaxconn to 4096 or more, and net.ipv4.ip_local_port_range to begin at 32768 or above",
		},
	}
}

func namespaces(l *look) {
	if _, err := l.namespace(); err != nil {
		l.fail("%v", err)
		return
	}
	if l.start {
		l.ok("can be entered")
		return
	}
	l.ok("can be made and entered")
}

// inside runs f on a thread in the namespace that is looked at.
func (l *look) inside(f func() error) error {
	ns, err := l.namespace()
	if err != nil {
		return err
	}
	return ns.Do(f)
}

// policyRouting lists the rules: a kernel without them knows no such request, or
// no such family.
func policyRouting(l *look) {
	families := map[string]int{"IPv4": unix.AF_INET}
	if hasIPv6() {
		families["IPv6"] = unix.AF_INET6
	}
	there, lacking := map[string]bool{}, map[string]bool{}
	for name, family := range families {
		err := l.inside(func() error {
			rules, err := l.facts.rules(family)
			if errors.Is(err, netlink.ErrDumpInterrupted) {
				return nil // somebody changes them: they are there
			}
			if err == nil && len(rules) == 0 {
				err = errors.New("no rules")
			}
			return err
		})
		if err != nil {
			lacking[fmt.Sprintf("%s (%v)", name, err)] = true
			continue
		}
		there[name] = true
	}
	if len(lacking) > 0 {
		l.fail("none for %s", list(lacking))
		return
	}
	l.ok("%s", list(there))
}

func sysctls(l *look) {
	var there []string
	bad := false
	err := l.inside(func() error {
		for _, s := range redirect.Sysctls(hasIPv6()) {
			path := filepath.Join("/proc/sys", s.Key)
			name := strings.ReplaceAll(s.Key, "/", ".")
			switch err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS); {
			case err == nil:
				there = append(there, name)
			case errors.Is(err, unix.ENOENT) && s.Optional:
			case errors.Is(err, unix.ENOENT):
				l.fail("%s is not there: %s", name, s.Why)
				bad = true
			default:
				l.fail("%s cannot be written (%v): %s", name, err, s.Why)
				bad = true
			}
		}
		return nil
	})
	switch {
	case err != nil:
		l.fail("%v", err)
	case !bad:
		l.ok("%s", strings.Join(there, ", "))
	}
}

// hasIPv6 says whether sockets of IPv6 can be made at all.
func hasIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

func ipv6(l *look) {
	if !hasIPv6() {
		l.warn("this kernel has none, or was booted without it")
		return
	}
	off := map[string]bool{}
	look := func() error {
		for _, which := range []string{"all", "default"} {
			key := "net/ipv6/conf/" + which + "/disable_ipv6"
			data, err := os.ReadFile(filepath.Join("/proc/sys", key))
			if err != nil {
				return err
			}
			if strings.TrimSpace(string(data)) != "0" {
				off[strings.ReplaceAll(key, "/", ".")] = true
			}
		}
		return nil
	}
	// The node's own, and those that a fresh namespace has.
	err := look()
	if err == nil && !l.start {
		err = l.inside(look)
	}
	switch {
	case err != nil:
		l.warn("look whether it is on: %v", err)
	case len(off) > 0:
		l.warn("switched off by %s", list(off))
	default:
		l.ok("on")
	}
}

// diagnosis has a listener found and ended.
func diagnosis(l *look) {
	ns, err := l.namespace()
	if err != nil {
		l.warn("%v", err)
		return
	}
	fd := -1
	err = ns.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err == nil {
			err = unix.Listen(fd, 1)
		}
		return err
	})
	if fd >= 0 {
		defer unix.Close(fd)
	}
	if err != nil {
		l.warn("make a socket to look for: %v", err)
		return
	}
	found, err := sockdiag.List(ns, sockdiag.Listening)
	switch {
	case err != nil:
		l.warn("%v", err)
		return
	case len(found) != 1:
		l.warn("one socket was made, and %d are listed", len(found))
		return
	}
	if err := l.facts.destroy(ns, found[0]); err != nil {
		l.warn("sockets can be listed, not ended: %v", err)
		return
	}
	l.ok("sockets can be listed and ended")
}

// metricsAddress is somebody else's where a daemon of the same run folder has it.
func metricsAddress(l *look) {
	addr := l.Config.Metrics.Address
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	s, err := lc.Listen(l.ctx, "tcp", addr.String())
	switch {
	case err == nil:
		s.Close()
		l.ok("%s is free", addr)
	case errors.Is(err, unix.EADDRINUSE) && redirect.CheckFree(l.Config.RunDir) != nil:
		l.ok("%s is that of the ztunnel that runs here", addr)
	default:
		l.fail("listen at %s: %v", addr, errno(err))
	}
}

func otherPrograms(l *look) {
	found, err := redirect.ForeignPrograms(l.Config.Cgroup)
	if err != nil {
		l.failed(err)
		return
	}
	if len(found) == 0 {
		l.ok("none at the hooks")
		return
	}
	for _, p := range found {
		l.warn("%s (program %d) is at the hook %s of the pods' cgroup, or of one above it", p.Name, p.ID, p.Hook)
	}
}

// Values below which kernelLimits warns.
const (
	enoughQueue = 4096  // redirect/socket asks for as many
	firstPort   = 32768 // deliveries use the ports below: redirect/socket
)

func kernelLimits(l *look) {
	var queue, syns, first, last int
	err := l.inside(func() error {
		for key, values := range map[string][]any{
			"net/core/somaxconn": {&queue}, "net/ipv4/tcp_max_syn_backlog": {&syns}, "net/ipv4/ip_local_port_range": {&first, &last},
		} {
			data, err := os.ReadFile(filepath.Join("/proc/sys", key))
			if err == nil {
				_, err = fmt.Sscan(string(data), values...)
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		l.warn("%v", err)
		return
	}
	said := fmt.Sprintf("in a new namespace: net.core.somaxconn %d, net.ipv4.tcp_max_syn_backlog %d, net.ipv4.ip_local_port_range %d-%d", queue, syns, first, last)
	if queue < enoughQueue || first < firstPort {
		l.warn("%s", said)
		return
	}
	l.ok("%s", said)
}
