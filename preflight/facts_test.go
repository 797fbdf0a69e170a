// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

// What the running kernel and the CPU are made of cannot be taken away, nor can the
// clock be set, without everybody noticing. Here the checks are told of a machine
// that lacks it; how a real kernel answers that lacks it, this does not show.
// (test/vm does, of an old one.)
func TestLacksThatCannotBeMade(t *testing.T) {
	for _, tt := range []struct {
		name, check  string
		change       func(*facts)
		state        State
		detail, mend string
	}{
		{"the clock is at its beginning", "clock", func(f *facts) { f.now = func() time.Time { return time.Unix(100, 0) } },
			Fail, "the clock says 1970-01-01T00:01:40Z", "NTP"},
		{"nobody keeps the clock", "clock", func(f *facts) { f.synced = func() (bool, error) { return false, nil } },
			Warn, "nobody keeps it in time", "NTP"},
		{"the clock is kept", "clock", func(f *facts) { f.synced = func() (bool, error) { return true, nil } }, OK, "", ""},
		{"no AES", "AES instructions", func(f *facts) { f.aes = func() bool { return false } }, Warn, "AES-NI", "-cpu host"},
		{"AES", "AES instructions", func(f *facts) { f.aes = func() bool { return true } }, OK, "", ""},
		{"no sk_lookup", "bpf programs", func(f *facts) {
			f.program = func(k ebpf.ProgramType, _ ebpf.AttachType) error {
				if k == ebpf.SkLookup {
					return unix.EINVAL
				}
				return nil
			}
		}, Fail, "too old: it lacks sk_lookup", "5.18"},
		{"no bpf_set_retval", "bpf helpers", func(f *facts) {
			f.helper = func(_ ebpf.ProgramType, fn asm.BuiltinFunc) error {
				if fn == asm.FnSetRetval {
					return ebpf.ErrNotSupported
				}
				return nil
			}
		}, Fail, "too old: it lacks bpf_set_retval", "5.18"},
		{"no socket storage", "bpf maps", func(f *facts) {
			f.mapType = func(m ebpf.MapType) error {
				if m == ebpf.SkStorage {
					return ebpf.ErrNotSupported
				}
				return nil
			}
		}, Fail, "too old: it lacks SkStorage", "5.18"},
		{"a map that is forbidden", "bpf maps", func(f *facts) { f.mapType = func(ebpf.MapType) error { return unix.EPERM } },
			Fail, "operation not permitted", "seccomp"},
		{"no rules of IPv6", "policy routing", func(f *facts) {
			f.rules = func(family int) ([]netlink.Rule, error) {
				if family == unix.AF_INET6 {
					return nil, unix.EAFNOSUPPORT
				}
				return netlink.RuleList(family)
			}
		}, Fail, "none for IPv6 (address family not supported", "CONFIG_IPV6_MULTIPLE_TABLES"},
		{"rules that change while they are listed", "policy routing", func(f *facts) {
			f.rules = func(int) ([]netlink.Rule, error) { return nil, netlink.ErrDumpInterrupted }
		}, OK, "IPv4, IPv6", ""},
		{"sockets cannot be ended", "socket diagnosis", func(f *facts) {
			f.destroy = func(*netns.NS, sockdiag.Socket) error { return sockdiag.ErrNoDestroy }
		}, Warn, "listed, not ended", "CONFIG_INET_DIAG_DESTROY"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newNode(t).machine()
			tt.change(m.facts)
			wants(t, Run(t.Context(), m), tt.check, tt.state, tt.detail, tt.mend)
		})
	}
}

// machine is what this process itself is to look at.
func (n node) machine() Machine {
	n.t.Helper()
	cfg, err := config.Load(filepath.Join(n.dir, "config.yaml"))
	if err != nil {
		n.t.Fatal(err)
	}
	return Machine{Config: cfg, facts: realFacts()}
}

// The queue and the ports that a new namespace has are the kernel's; a process that
// finds other values for them is told.
func TestKernelLimits(t *testing.T) {
	n := newNode(t)
	found := n.look(n.command(), fakeSysctls(map[string]string{"net/core/somaxconn": "128", "net/ipv4/tcp_max_syn_backlog": "512", "net/ipv4/ip_local_port_range": "1024\t60999"}))
	wants(t, found, "kernel limits", Warn, "net.core.somaxconn 128, net.ipv4.tcp_max_syn_backlog 512, net.ipv4.ip_local_port_range 1024-60999", "net.core.somaxconn to 4096")
	wants(t, n.look(n.command(), nothing), "kernel limits", OK, "", "")
}

// A look that is told to end does so, and takes away what it has put up.
func TestRunEnds(t *testing.T) {
	m := newNode(t).machine()
	ctx, cancel := context.WithCancel(t.Context())
	m.facts.rules = func(int) ([]netlink.Rule, error) { // in the middle
		cancel()
		return nil, errors.New("ended")
	}
	found := Run(ctx, m)
	if len(of(found, "policy routing")) == 0 || len(of(found, "trial")) > 0 {
		t.Errorf("%+v", found)
	}
	if found := left(t, filepath.Dir(m.Config.RunDir)); len(found) > 0 {
		t.Errorf("left behind: %v", found)
	}
}
