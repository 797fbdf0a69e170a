// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/redirect"
)

func trialCheck() Check {
	return Check{
		Name: "trial", run: trial,
		after:   []string{"capabilities", "bpf", "bpf programs", "bpf helpers", "bpf maps", "cgroup", "bpffs", "network namespaces", "policy routing", "sysctls"},
		Why:     "a namespace of the check's own is enrolled below a cgroup of its own, as a pod is: hooks, maps, pins, rule, route, lookup",
		Without: "no pod is enrolled",
		Mend:    "its error names what failed; please report one that no other check explains",
	}
}

// Addresses of the trial's pod, for documentation (RFC 5737, RFC 3849). It has no
// way out.
var (
	trial4 = netip.MustParseAddr("192.0.2.1")
	trial6 = netip.MustParseAddr("2001:db8::1")
)

func trial(l *look) {
	dir, _, err := redirect.FindCgroup(l.Config.Cgroup)
	if err != nil {
		l.failed(err)
		return
	}
	ns, err := l.namespace()
	if err != nil {
		l.fail("%v", err)
		return
	}
	own := filepath.Join(dir, fmt.Sprintf("culvert-check-%d", os.Getpid()))
	if err := os.Mkdir(own, 0o755); err != nil {
		l.say(Skipped, "a cgroup for it cannot be made in %s: %v", dir, errno(err))
		return
	}
	defer os.Remove(own)
	addrs := []netip.Addr{trial4}
	if hasIPv6() {
		addrs = append(addrs, trial6)
	}
	if err := enrol(l.ctx, l.writable, own, ns, addrs); err != nil {
		l.fail("%v", err)
		return
	}
	l.ok("a namespace was enrolled, looked at, and released")
}

// enrol does for a namespace what the daemon does for a pod's, with a run folder
// below in, and undoes it.
func enrol(ctx context.Context, in, cgroup string, ns *netns.NS, addrs []netip.Addr) (err error) {
	undo := func(f func() error) { err = errors.Join(err, f()) }
	dir, err := os.MkdirTemp(in, ".culvert-check-")
	if err != nil {
		return err
	}
	// Not all that is below: a mount that could not be taken away is not followed.
	defer undo(func() error { return os.Remove(dir) })
	// bpffs cannot be mounted where nothing is, so the run folder has its own, and
	// the clean-up takes both away.
	cfg := redirect.Config{RunDir: filepath.Join(dir, "run"), BPFFS: filepath.Join(dir, "none"), Cgroup: cgroup}
	defer undo(func() error {
		_, err := redirect.Cleanup(cfg)
		return err
	})
	node, err := redirect.Open(cfg)
	if err != nil {
		return err
	}
	defer undo(node.Close)
	if err := ns.Do(func() error { return address(addrs) }); err != nil {
		return fmt.Errorf("address a namespace: %w", err)
	}
	pod, err := node.AddPod(ctx, redirect.PodConfig{Name: "check", NS: ns, NetnsPath: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()), Addrs: addrs})
	if err != nil {
		return err
	}
	defer undo(pod.Release)
	if err := pod.Enrol(); err != nil {
		return err
	}
	return pod.Probe(ctx)
}

// address gives lo addresses, on a thread in the namespace.
func address(addrs []netip.Addr) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, a := range addrs {
		if a.Is6() { // it may be that new namespaces have it off
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("0"), 0); err != nil {
				return err
			}
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(lo, addr); err != nil {
			return err
		}
	}
	return nil
}
