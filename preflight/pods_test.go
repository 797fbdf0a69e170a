// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/internal/testns"
)

// withPod is a node with a pod whose namespace has its addresses on lo.
func withPod(t *testing.T, more ...string) (node, *netns.NS) {
	t.Helper()
	n, ns := newNode(t, more...), testns.New(t)
	do(t, ns, func() error { return address([]netip.Addr{trial4, trial6}) })
	n.write("pods.yaml", fmt.Sprintf("pods: [{name: web, netns: /proc/%d/fd/%d, addresses: [%s, \"%s\"]}]\n", os.Getpid(), ns.FD(), trial4, trial6))
	return n, ns
}

func do(t *testing.T, ns *netns.NS, f func() error) {
	t.Helper()
	if err := ns.Do(f); err != nil {
		t.Fatal(err)
	}
}

// A pod that cannot be enrolled is named with the reason. The control, at first, can.
func TestPodLacks(t *testing.T) {
	n, _ := withPod(t)
	found := n.look(n.command(), nothing)
	wants(t, found, "pods", OK, "all of 1", "")
	wants(t, found, "other meshes", OK, "none in 1 pod", "")

	n.write("pods.yaml", "pods: [{name: web, netns: /run/netns/culvert-none, addresses: [192.0.2.1]}]\n")
	wants(t, n.look(n.command(), nothing), "pods", Fail, "default_web: open network namespace /run/netns/culvert-none", "bring its namespace in order")

	for _, tt := range []struct {
		name, detail string
		change       func() error
		state        State
		mend         string
	}{
		{"lo down", "lo is down", func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return netlink.LinkSetDown(lo)
		}, Fail, ""},
		{"no address", "no interface in the namespace has the address 192.0.2.1", func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return netlink.AddrDel(lo, &netlink.Addr{IPNet: &net.IPNet{IP: trial4.AsSlice(), Mask: net.CIDRMask(32, 32)}})
		}, Fail, ""},
		{"IPv6 off", "IPv6 is switched off in its namespace", func() error {
			return write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")
		}, Warn, "disable_ipv6=0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, ns := withPod(t)
			do(t, ns, tt.change)
			wants(t, n.look(n.command(), nothing), "pods", tt.state, "default_web: "+tt.detail, tt.mend)
		})
	}
}

// A port of the tunnel's that somebody in the pod listens on is named.
func TestPodsPortIsTaken(t *testing.T) {
	n, ns := withPod(t)
	fd := -1
	do(t, ns, func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet4{Port: 15008})
		}
		if err == nil {
			err = unix.Listen(fd, 1)
		}
		return err
	})
	defer unix.Close(fd)
	wants(t, n.look(n.command(), nothing), "pods", Fail, "a process of user 0 listens on port 15008", "listen elsewhere")
}

// start starts a process in a cgroup and a network namespace.
func start(t *testing.T, dir string, ns *netns.NS) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	do(t, ns, cmd.Start)
	t.Cleanup(func() {
		cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// A pod with a process that the hooks do not see is named: one in another cgroup,
// and where the cgroups are a container's own, one in the node's.
func TestPodOutsideOfTheCgroup(t *testing.T) {
	pods := testns.Cgroup(t, "pods")
	other := testns.Cgroup(t, "other")
	n, ns := withPod(t, "cgroup: "+pods)
	start(t, pods, ns)
	found := n.look(n.command(), nothing)
	wants(t, found, "pods", OK, "all of 1", "")
	wants(t, found, "cgroup", OK, pods, "")
	start(t, other, ns)
	wants(t, n.look(n.command(), nothing), "pods", Fail, "(sleep) in /"+filepath.Base(other), "cgroup")

	n, ns = withPod(t)
	start(t, other, ns)
	wants(t, n.look(n.command(), nothing), "pods", OK, "all of 1", "") // the root holds them all
	f, err := os.Open(pods)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := n.command(innerEnv + "=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	wants(t, n.look(cmd, nothing), "pods", Fail, "(sleep) in /../"+filepath.Base(other), "cgroup")
}

// foreignProgram is a program of somebody else's that lets everything pass.
func foreignProgram(t *testing.T, name string, kind ebpf.ProgramType, attach ebpf.AttachType) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: kind, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// Cilium's load balancer in sockets sits at a cgroup above the pods' and is named,
// with its setting.
func TestForeignConnectProgram(t *testing.T) {
	above := testns.Cgroup(t, "above")
	pods := filepath.Join(above, "pods")
	if err := os.Mkdir(pods, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(pods)
	n := newNode(t, "cgroup: "+pods)
	wants(t, n.look(n.command(), nothing), "other programs", OK, "none", "")
	// As Cilium names it, as far as the kernel keeps it: 15 bytes.
	prog := foreignProgram(t, "cil_sock4_conne", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect)
	l, err := link.AttachCgroup(link.CgroupOptions{Path: above, Attach: ebpf.AttachCGroupInet4Connect, Program: prog})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	wants(t, n.look(n.command(), nothing), "other programs", Warn, "cil_sock4_conne (program ", "socketLB.hostNamespaceOnly=true")
}

func TestForeignLookupProgram(t *testing.T) {
	n, ns := withPod(t)
	l, err := link.AttachNetNs(ns.FD(), foreignProgram(t, "theirs", ebpf.SkLookup, ebpf.AttachSkLookup))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	wants(t, n.look(n.command(), nothing), "pods", Warn, "default_web: theirs chooses listeners", "15008")
}
