// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"net"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Each need lacks in turn, and is named with its mend. The control is a process
// that lacks nothing: there the same check is ok.
func TestLacks(t *testing.T) {
	control := newNode(t)
	whole := control.look(control.command(), nothing)
	for _, tt := range []struct {
		name    string
		check   string
		without func() error
		env     []string
		command func(*exec.Cmd)
		state   State
		detail  string
		mend    string
		skips   []string // checks that can tell nothing then
	}{
		{name: "no CAP_NET_ADMIN", check: "capabilities", without: without(unix.CAP_NET_ADMIN), state: Fail,
			detail: "the process lacks CAP_NET_ADMIN (for", mend: "as root", skips: []string{"bpf", "trial"}},
		{name: "no CAP_SYS_ADMIN", check: "capabilities", without: without(unix.CAP_SYS_ADMIN), state: Fail,
			detail: "the process lacks CAP_SYS_ADMIN (for", mend: "as root", skips: []string{"bpffs", "network namespaces", "sysctls", "trial"}},
		{name: "few descriptors", check: "descriptors", env: []string{filesEnv + "=500"}, state: Warn,
			detail: "at most 500 open files", mend: "LimitNOFILE"},
		{name: "no locked memory", check: "bpf maps", env: []string{lockedEnv + "=0"}, without: without(unix.CAP_IPC_LOCK, unix.CAP_SYS_RESOURCE),
			state: OK, detail: "SkStorage"}, // no need: the cgroup is charged
		{name: "bpf forbidden by seccomp", check: "bpf", without: denied(unix.SYS_BPF, unix.EPERM, -1, 0), state: Fail,
			detail: "it has a seccomp filter", mend: "seccomp profile that allows bpf(2)", skips: []string{"bpf programs", "bpf helpers", "bpf maps", "other programs", "trial"}},
		{name: "a kernel without bpf", check: "bpf", without: denied(unix.SYS_BPF, unix.ENOSYS, -1, 0), state: Fail,
			detail: "no bpf()", mend: "CONFIG_BPF_SYSCALL"},
		{name: "bpf in a user namespace", check: "bpf", command: inUserNamespace, state: Fail,
			detail: "it is in a user namespace", mend: "outside of a user namespace"},
		{name: "cgroup2 unmounted", check: "cgroup", without: unmounted("cgroup2"), state: Fail,
			detail: "not mounted", mend: "mount -t cgroup2", skips: []string{"pods", "other programs", "trial"}},
		{name: "namespaces of its own", check: "cgroup", command: func(c *exec.Cmd) {
			c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWCGROUP | unix.CLONE_NEWPID}
		}, state: Warn, detail: "namespace of its own", mend: "hostPID"},
		{name: "bpffs unmounted", check: "bpffs", without: unmounted("bpf"), state: Warn,
			detail: "not mounted", mend: "mount -t bpf bpf /sys/fs/bpf"},
		{name: "bpffs not to be mounted", check: "bpffs", without: all(unmounted("bpf"), denied(unix.SYS_MOUNT, unix.EPERM, -1, 0)), state: Fail,
			detail: "mount bpffs", mend: "mount -t bpf bpf /sys/fs/bpf", skips: []string{"trial"}},
		{name: "no namespaces made", check: "network namespaces", without: denied(unix.SYS_UNSHARE, unix.EPERM, -1, 0), state: Fail,
			detail: "make network namespace", mend: "unshare(2)", skips: []string{"policy routing", "sysctls", "IPv6", "pods", "trial"}},
		{name: "no namespaces entered", check: "network namespaces", without: denied(unix.SYS_SETNS, unix.EPERM, -1, 0), state: Fail,
			detail: "enter network namespace", mend: "setns(2)"},
		{name: "sysctls read-only", check: "sysctls", without: readOnly("/proc/sys"), state: Fail,
			detail: "net.ipv4.tcp_fwmark_accept cannot be written (read-only file system)", mend: "privileged container", skips: []string{"trial"}},
		{name: "a sysctl missing", check: "sysctls", without: sysctlsWithout("net/ipv4/tcp_fwmark_accept"), state: Fail,
			detail: "net.ipv4.tcp_fwmark_accept is not there", mend: "kernel that has them"},
		{name: "a sysctl of IPv6 missing", check: "sysctls", without: sysctlsWithout("net/ipv6/fwmark_reflect"), state: Fail,
			detail: "net.ipv6.fwmark_reflect is not there", mend: "kernel that has them"},
		{name: "MPTCP missing", check: "sysctls", without: sysctlsWithout("net/mptcp/enabled"), state: OK,
			detail: "tcp_fwmark_accept, net.ipv4.fwmark_reflect, net.ipv6.fwmark_reflect"}, // and no fail: it needs none
		{name: "no sockets of IPv6", check: "IPv6", without: denied(unix.SYS_SOCKET, unix.EAFNOSUPPORT, 0, unix.AF_INET6), state: Warn,
			detail: "has none", mend: "ipv6.disable=1"},
		{name: "no socket diagnosis", check: "socket diagnosis", without: denied(unix.SYS_SOCKET, unix.EPROTONOSUPPORT, 2, unix.NETLINK_SOCK_DIAG), state: Warn,
			detail: "list sockets", mend: "CONFIG_INET_DIAG"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			cmd := n.command(tt.env...)
			if tt.command != nil {
				tt.command(cmd)
			}
			take := tt.without
			if take == nil {
				take = nothing
			}
			found := n.look(cmd, take)
			wants(t, found, tt.check, tt.state, tt.detail, tt.mend)
			if tt.state == OK && len(of(found, tt.check)) != 1 {
				t.Errorf("%+v", of(found, tt.check))
			}
			for _, s := range tt.skips {
				wants(t, found, s, Skipped, "lacks", "")
			}
			if found := left(t, n.dir); len(found) > 0 {
				t.Errorf("left behind: %v", found)
			}
			if tt.check != "descriptors" { // of which a machine has many or few
				wants(t, whole, tt.check, OK, "", "")
			}
		})
	}
}

func inUserNamespace(c *exec.Cmd) {
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
}

// A whole machine lacks nothing, and nothing is left of the look. Where everything
// but the run folder is read-only, as in a container, it lacks nothing either.
func TestWholeMachine(t *testing.T) {
	n := newNode(t)
	for name, where := range map[string]func() error{"as it is": nothing, "read-only": onlyWritable(n.dir)} {
		for _, f := range n.look(n.command(), where) {
			if f.State == Fail || f.State == Skipped {
				t.Errorf("%s: %+v", name, f)
			}
		}
	}
	if found := left(t, n.dir); len(found) > 0 {
		t.Errorf("left behind: %v", found)
	}
}

// IPv6 that a new namespace, or the node itself, has off is said.
func TestIPv6SwitchedOff(t *testing.T) {
	n := newNode(t)
	off := func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")
	}
	wants(t, n.look(n.command(), off), "IPv6", Warn, "switched off by net.ipv6.conf.all.disable_ipv6", "disable_ipv6=0")
}

func TestMetricsAddressTaken(t *testing.T) {
	s, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	n := newNode(t)
	n.write("config.yaml", "runDir: run\nidentity: {ca: {dir: ca}}\nmetrics: {address: \""+s.Addr().String()+"\"}\n")
	wants(t, n.look(n.command(), nothing), "metrics address", Fail, "address already in use", "metrics.address")
}

func TestConfigurationLacks(t *testing.T) {
	n := newNode(t)
	n.write("workloads.yaml", "workloads: [{nam: x}]\n")
	found := n.look(n.command(), nothing)
	wants(t, found, "configuration", Fail, "unknown key", "config --check")
	wants(t, found, "pods", Skipped, "configuration", "")

	n = newNode(t)
	for _, name := range []string{"config.yaml", "pods.yaml", "workloads.yaml"} {
		n.write(name, "")
	}
	wants(t, n.look(n.command(), nothing), "pods", Warn, "none is listed", n.dir+"/pods.yaml")

	n = newNode(t)
	cmd := n.command()
	cmd.Env = append(cmd.Env, childEnv+"="+n.dir+"/none.yaml")
	wants(t, n.look(cmd, nothing), "configuration", Fail, "none.yaml: no such file", "--config")
}

func TestRunFolder(t *testing.T) {
	n := newNode(t)
	found := n.look(n.command(), readOnly(n.dir))
	wants(t, found, "run folder", Fail, "read-only file system", "runDir")
	n.write("run", "a file")
	wants(t, n.look(n.command(), nothing), "run folder", Fail, "is no folder", "runDir")
}

// A daemon that lacks more than one thing names all of them at its start, in the
// words of the check, and warns of what has a cost.
func TestStart(t *testing.T) {
	n := newNode(t)
	_, stderr, err := output(t, n.command(startEnv+"=1"), all(readOnly("/proc/sys"), denied(unix.SYS_BPF, unix.EPERM, -1, 0)))
	if err == nil || !strings.Contains(stderr, "this machine lacks what ztunnel needs:\n  bpf: ") || !strings.Contains(stderr, "\n  sysctls: net.ipv4.tcp_fwmark_accept cannot be written") {
		t.Errorf("%v: %s", err, stderr)
	}
	_, stderr, err = output(t, n.command(startEnv+"=1"), without(unix.CAP_NET_ADMIN))
	if err == nil || !strings.HasPrefix(stderr, "capabilities: the process lacks CAP_NET_ADMIN") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("%v: %s", err, stderr)
	}
	stdout, stderr, err := output(t, n.command(startEnv+"=1", filesEnv+"=500"), nothing)
	if err != nil || strings.Count(stdout, "check=descriptors") != 1 || !strings.Contains(stdout, "LimitNOFILE") {
		t.Errorf("%v: %s%s", err, stdout, stderr)
	}
}
