// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/internal/testns"
	"github.com/culvert-mesh/culvert/redirect"
)

var watched = []string{"net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect", "net/mptcp/enabled"}

// traces is what can be seen of a redirection in the pod's namespace.
func (w *world) traces() []string {
	w.t.Helper()
	var out []string
	w.in(w.pod, func() error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := netlink.RuleList(family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				out = append(out, fmt.Sprintf("rule %s mark %#x protocol %d", r, r.Mark, r.Protocol))
			}
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			for _, r := range routes {
				if r.Protocol == unix.RTPROT_KERNEL {
					continue // comes when the kernel is ready for it
				}
				out = append(out, "route "+r.String())
			}
		}
		return nil
	})
	for _, key := range watched {
		out = append(out, key+"="+w.sysctl(key))
	}
	slices.Sort(out)
	return out
}

func (w *world) pinned() []string {
	w.t.Helper()
	var out []string
	err := filepath.WalkDir(filepath.Join(w.cfg.BPFFS, "culvert"), func(path string, _ os.DirEntry, err error) error {
		if err == nil {
			out = append(out, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.t.Fatal(err)
	}
	return out
}

// A daemon that is gone leaves the pod refused; the next one takes over what it
// left, and its successor's cleanup restores what was before either.
func TestTakeOverAndCleanup(t *testing.T) {
	w := newWorld(t)
	// One of them is set already, and stays.
	w.in(w.pod, func() error { return os.WriteFile("/proc/sys/net/ipv4/fwmark_reflect", []byte("1"), 0) })
	before := w.traces()
	w.start()
	if now := w.traces(); slices.Equal(now, before) {
		t.Fatal("the test sees no trace of a redirection")
	}
	out := w.listen(w.outside, netip.MustParseAddrPort("0.0.0.0:8080"))
	app := w.listen(w.pod, netip.MustParseAddrPort("0.0.0.0:8080"))
	for round := range 2 {
		w.must(w.stop())
		for _, c := range []struct {
			from *netns.NS
			dst  netip.AddrPort
		}{
			{w.pod, at(remote4, 8080)}, {w.pod, at(remote6, 8080)}, // captured
			{w.outside, at(pod4, 8080)}, {w.outside, at(pod4, 15008)}, {w.outside, at(pod6, 8080)}, // STRICT
		} {
			if _, err := w.connect(c.from, c.dst, nil); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("round %d: without a daemon, connect to %s: %v", round, c.dst, err)
			}
		}
		// None of our business, with or without a daemon.
		fd, err := w.connect(w.pod, at(outside4, 8080), nil)
		w.must(err)
		w.exchange(fd, w.accept(out))
		w.start()
		n := w.counted(func() {
			fd, err := w.connect(w.pod, at(remote4, 8080), nil)
			w.must(err)
			w.exchange(fd, w.accept(w.listeners[redirect.Outbound4]))
			_, err = w.connect(w.outside, at(pod4, 8080), nil)
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("connect from outside: %v", err)
			}
		})
		// Once each: the old programs do not go on beside the new ones.
		if n["connect_carried"] != 1 || n["steer_outbound"] != 1 || n["strict_refused"] != 1 {
			t.Errorf("round %d: counted %v", round, n)
		}
	}
	if pending(app) {
		t.Error("something has reached the application")
	}
	if len(w.pinned()) == 0 {
		t.Fatal("the test sees no pins")
	}
	w.must(w.stop())
	report, err := redirect.Cleanup(w.cfg)
	w.must(err)
	t.Log(strings.Join(report, "\n"))
	if after := w.traces(); !slices.Equal(after, before) {
		t.Errorf("left behind:\n%s\nwas:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
	if after := w.pinned(); len(after) > 0 {
		t.Errorf("pins left behind: %v", after)
	}
	if _, err := os.Stat(w.cfg.RunDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("run directory: %v", err)
	}
	// Then all is as before.
	fd, err := w.connect(w.outside, at(pod4, 8080), nil)
	w.must(err)
	w.exchange(fd, w.accept(app))
	fd, err = w.connect(w.pod, at(outside4, 8080), nil)
	w.must(err)
	w.exchange(fd, w.accept(out))
	if report, err = redirect.Cleanup(w.cfg); err != nil || len(report) > 0 {
		t.Errorf("a second cleanup: %v, %v", report, err)
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	w := newWorld(t)
	w.start()
	me := fmt.Sprintf("process %d", os.Getpid())
	if n, err := redirect.Open(w.cfg); err == nil || !strings.Contains(err.Error(), me) {
		t.Errorf("a second one: %v, %v; want an error that names %s", n, err, me)
	}
	if _, err := redirect.Cleanup(w.cfg); err == nil || !strings.Contains(err.Error(), me) {
		t.Errorf("cleanup beside a daemon: %v; want an error that names %s", err, me)
	}
	// Nothing has changed for the first.
	fd, err := w.connect(w.pod, at(remote4, 8080), nil)
	w.must(err)
	w.exchange(fd, w.accept(w.listeners[redirect.Outbound4]))
	// One of another run directory is another instance.
	cfg := w.cfg
	cfg.RunDir = filepath.Join(t.TempDir(), "other")
	other, err := redirect.Open(cfg)
	w.must(err)
	n := w.counted(func() {
		_, err := w.connect(w.pod, at(remote4, 8080), nil)
		w.must(err)
		w.accept(w.listeners[redirect.Outbound4])
	})
	if n["connect_carried"] != 1 {
		t.Errorf("beside another instance: counted %v", n)
	}
	w.must(other.Close())
	_, err = redirect.Cleanup(cfg)
	w.must(err)
}

func TestReleaseRestoresThePod(t *testing.T) {
	w := newWorld(t)
	before := w.traces()
	w.start()
	w.must(w.redirected.Release())
	w.must(w.redirected.Release())
	if after := w.traces(); !slices.Equal(after, before) {
		t.Errorf("left behind:\n%s\nwas:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
	app := w.listen(w.pod, netip.MustParseAddrPort("0.0.0.0:8080"))
	fd, err := w.connect(w.outside, at(pod4, 8080), nil)
	w.must(err)
	w.exchange(fd, w.accept(app))
	// It can be added again.
	p, err := w.node.AddPod(t.Context(), w.podConfig())
	w.must(err)
	if _, err := w.node.AddPod(t.Context(), w.podConfig()); err == nil {
		t.Error("the same pod could be added twice")
	}
	w.must(p.Release())
}

// Pods of an earlier daemon that the next one does not know stay refused until
// it releases them.
func TestReleaseOthers(t *testing.T) {
	w := newWorld(t)
	before := w.traces()
	w.start()
	w.must(w.stop())
	var err error
	w.node, err = redirect.Open(w.cfg)
	w.must(err)
	if _, err := w.connect(w.outside, at(pod4, 8080), nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connect: %v", err)
	}
	report, err := w.node.ReleaseOthers(nil)
	if err != nil || len(report) == 0 {
		t.Errorf("release: %q, %v", report, err)
	}
	if after := w.traces(); !slices.Equal(after, before) {
		t.Errorf("left behind:\n%s", strings.Join(after, "\n"))
	}
}

// A pod whose namespace was renamed meanwhile is found; one that is gone is
// forgotten.
func TestCleanupFindsTheNamespace(t *testing.T) {
	w := newWorld(t)
	before := w.traces()
	w.start()
	w.must(w.stop())
	renamed := w.podPath + "-renamed"
	w.must(os.WriteFile(renamed, nil, 0o444))
	w.must(unix.Mount(w.podPath, renamed, "", unix.MS_BIND, ""))
	t.Cleanup(func() {
		if err := netns.DeleteNamed(filepath.Base(renamed)); err != nil {
			t.Error(err)
		}
	})
	w.must(netns.DeleteNamed(filepath.Base(w.podPath)))
	// Another namespace under the old name is left alone.
	other, err := netns.CreateNamed(filepath.Base(w.podPath))
	w.must(err)
	defer other.Close()
	if _, err := redirect.Cleanup(w.cfg); err != nil {
		t.Fatal(err)
	}
	if after := w.traces(); !slices.Equal(after, before) {
		t.Errorf("left behind:\n%s", strings.Join(after, "\n"))
	}
}

func TestCleanupAfterTheNamespaceIsGone(t *testing.T) {
	w := newWorld(t)
	name := fmt.Sprintf("culvert-redirect-%d-gone", os.Getpid())
	ns, err := netns.CreateNamed(name)
	w.must(err)
	t.Cleanup(func() {
		if err := netns.DeleteNamed(name); err != nil {
			t.Error(err)
		}
	})
	w.in(ns, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}); err != nil {
			return err
		}
		return setUpEth0(pod4, pod6, outside4, outside6)
	})
	w.node, err = redirect.Open(w.cfg)
	w.must(err)
	p, err := w.node.AddPod(t.Context(), redirect.PodConfig{Name: "default/gone", NS: ns, NetnsPath: filepath.Join(netns.Dir, name), Addrs: []netip.Addr{pod4}})
	w.must(err)
	w.must(p.Enrol())
	w.must(w.node.Close())
	w.must(ns.Close())
	w.must(netns.DeleteNamed(name))
	report, err := redirect.Cleanup(w.cfg)
	if err != nil || !strings.Contains(strings.Join(report, "\n"), "pod default/gone: its namespace is gone") {
		t.Errorf("%v, %q", err, report)
	}
}

// A pod that lacks what it needs is refused with a word on it, and left as it
// was.
func TestAddPodRefuses(t *testing.T) {
	w := newWorld(t)
	before := w.traces()
	var err error
	w.node, err = redirect.Open(w.cfg)
	w.must(err)
	for _, tt := range []struct {
		name  string
		addrs []netip.Addr
		want  string
	}{
		{"no address", nil, "no address"},
		{"two of a family", []netip.Addr{pod4, outside4}, "two addresses"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := w.podConfig()
			cfg.Addrs = tt.addrs
			if _, err := w.node.AddPod(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	if after := w.traces(); !slices.Equal(after, before) {
		t.Errorf("left behind:\n%s", strings.Join(after, "\n"))
	}
}

// Without IPv6 the pod's IPv4 address is carried, and nothing else tried.
func TestIPv6Disabled(t *testing.T) {
	w := newWorld(t)
	w.in(w.pod, func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0) })
	before := w.traces()
	w.start()
	if got := w.redirected.Addrs(); !slices.Equal(got, []netip.Addr{pod4}) {
		t.Errorf("steered addresses: %v", got)
	}
	for _, dst := range []netip.Addr{remote4, mapped(remote4)} {
		fd, err := w.connect(w.pod, at(dst, 8080), nil)
		w.must(err)
		w.exchange(fd, w.accept(w.listeners[redirect.Outbound4]))
	}
	if _, err := w.connect(w.pod, at(remote6, 8080), nil); err == nil {
		t.Error("an IPv6 connection was made")
	}
	w.must(w.redirected.Release())
	if after := w.traces(); !slices.Equal(after, before) {
		t.Errorf("left behind:\n%s", strings.Join(after, "\n"))
	}
}

// Processes outside the cgroup that is hooked would send plaintext.
func TestEnrolRefusesProcessesOutsideTheCgroup(t *testing.T) {
	w := newWorld(t)
	dir := testns.Cgroup(t, "pods")
	w.cfg.Cgroup = dir
	var err error
	w.node, err = redirect.Open(w.cfg)
	w.must(err)
	p, err := w.node.AddPod(t.Context(), w.podConfig())
	w.must(err)
	w.must(p.Enrol()) // nobody is there
	cmd := sleeper(t, w.pod)
	if err := p.Enrol(); err == nil || !strings.Contains(err.Error(), fmt.Sprint(cmd)) {
		t.Errorf("%v, want an error that names process %d", err, cmd)
	}
	w.must(os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, cmd), 0))
	w.must(p.Enrol())
	// A take-over with another cgroup moves the hooks there.
	w.must(w.node.Close())
	w.cfg.Cgroup = ""
	w.start()
	n := w.counted(func() {
		_, err := w.connect(w.pod, at(remote4, 8080), nil)
		w.must(err)
		w.accept(w.listeners[redirect.Outbound4])
	})
	if n["connect_carried"] != 1 {
		t.Errorf("counted %v", n)
	}
}

// sleeper starts a process in ns that waits to be killed.
func sleeper(t *testing.T, ns *netns.NS) (pid int) {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

// A pod that is left and comes back under another name, in the same namespace, is
// refused in between and never in plaintext.
func TestLeaveAndReturnUnderAnotherName(t *testing.T) {
	w := newWorld(t)
	before := w.traces()
	w.start()
	for slot, fd := range w.listeners {
		unix.Close(fd)
		delete(w.listeners, slot)
	}
	w.must(w.redirected.Leave())
	refused := func() {
		t.Helper()
		if _, err := w.connect(w.pod, at(remote4, 8080), nil); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connect from the pod: %v, want it refused", err)
		}
		if _, err := w.connect(w.outside, at(pod4, 8080), nil); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connect to the pod: %v, want it refused", err)
		}
	}
	refused()
	cfg := w.podConfig()
	cfg.Name += "-again"
	p, err := w.node.AddPod(t.Context(), cfg)
	w.must(err)
	refused()
	w.must(p.Abandon()) // was taken over: stays refused
	refused()
	if report, err := w.node.ReleaseOthers(func(_, path string) bool { return path == cfg.NetnsPath }); err != nil || len(report) > 0 {
		t.Errorf("a pod that is to be kept was released: %q, %v", report, err)
	}
	refused()
	p, err = w.node.AddPod(t.Context(), cfg)
	w.must(err)
	w.must(p.Enrol())
	w.must(p.Release())
	if after := w.traces(); !slices.Equal(after, before) {
		t.Errorf("left behind:\n%s", strings.Join(after, "\n"))
	}
	for _, pin := range w.pinned() {
		if strings.Contains(pin, "/pods/") {
			t.Errorf("pin left: %s", pin)
		}
	}
}
