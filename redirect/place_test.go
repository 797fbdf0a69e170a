// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/redirect"
)

// Where bpffs cannot be mounted at its usual place, the run directory has one,
// and cleanup takes it away.
func TestBPFFSOfItsOwn(t *testing.T) {
	w := newWorld(t)
	w.cfg.BPFFS = filepath.Join(t.TempDir(), "nowhere")
	w.start()
	w.must(w.stop())
	if _, err := w.connect(w.pod, at(remote4, 8080), nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("without a daemon, connect: %v", err)
	}
	w.start()
	_, err := w.connect(w.pod, at(remote4, 8080), nil)
	w.must(err)
	w.accept(w.listeners[redirect.Outbound4])
	w.must(w.stop())
	if _, err := redirect.Cleanup(w.cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(w.cfg.RunDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("run directory: %v", err)
	}
}

// Pins of another layout are never misread, nor passed over by a cleanup: what
// they attach goes on.
func TestOtherLayoutIsRefused(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.must(w.stop())
	found, err := filepath.Glob(filepath.Join(w.cfg.BPFFS, "culvert/*/v3"))
	if err != nil || len(found) != 1 {
		t.Fatalf("pins: %v, %v", found, err)
	}
	w.start() // the same one is taken over
	w.must(w.stop())
	old := filepath.Join(filepath.Dir(found[0]), "v0")
	w.must(os.Mkdir(old, 0o700))
	if n, err := redirect.Open(w.cfg); err == nil || !strings.Contains(err.Error(), "layout v0") {
		t.Errorf("open: %v, %v; want an error that names layout v0", n, err)
	}
	if _, err := redirect.Cleanup(w.cfg); err == nil || !strings.Contains(err.Error(), "layout v0") {
		t.Errorf("cleanup: %v; want an error that names layout v0", err)
	}
	w.must(os.Remove(old))
	if _, err := redirect.Cleanup(w.cfg); err != nil {
		t.Error(err)
	}
}

// An address whose duplicate detection still runs is waited for.
func TestTentativeAddressIsWaitedFor(t *testing.T) {
	w := newWorld(t)
	fresh := netip.MustParseAddr("fd99::77")
	w.in(w.pod, func() error {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/eth0/accept_dad", []byte("1"), 0)
		if err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(fresh.String() + "/120")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(link, addr)
	})
	var err error
	w.node, err = redirect.Open(w.cfg)
	w.must(err)
	cfg := w.podConfig()
	cfg.Addrs = []netip.Addr{pod4, fresh}
	_, err = w.node.AddPod(t.Context(), cfg)
	w.must(err)
}

func TestPodWithoutItsAddressIsRefused(t *testing.T) {
	w := newWorld(t)
	var err error
	w.node, err = redirect.Open(w.cfg)
	w.must(err)
	cfg := w.podConfig()
	cfg.Addrs = []netip.Addr{outside4}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = w.node.AddPod(ctx, cfg)
	if err == nil || !strings.Contains(err.Error(), "no interface in the namespace has the address 10.99.0.2") {
		t.Errorf("%v", err)
	}
	w.in(w.pod, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(lo)
	})
	_, err = w.node.AddPod(ctx, w.podConfig())
	if err == nil || !strings.Contains(err.Error(), "lo is down") {
		t.Errorf("%v", err)
	}
}

// A cgroup may be named by its path below the mount, or as /proc/PID/cgroup has it.
func TestCheckCgroup(t *testing.T) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var v1, v2 string
	for line := range strings.Lines(string(mounts)) {
		switch f := strings.Fields(line); f[2] {
		case "cgroup":
			v1 = f[1]
		case "cgroup2":
			v2 = f[1]
		}
	}
	procs := filepath.Join(v2, "cgroup.procs")
	for cgroup, want := range map[string]string{
		"":                     "",
		v2:                     "",
		"/":                    "",
		"/culvert-none":        "/culvert-none: no such cgroup: set cgroup to one, such as " + v2 + `/kubepods, or to "" for the root`,
		v2 + "/culvert-none":   v2 + "/culvert-none: no such cgroup: ",
		"/cgroup.procs":        procs + ": is a file of a cgroup, not the cgroup: ",
		procs:                  procs + ": is a file of a cgroup, not the cgroup: ",
		procs + "/x":           procs + "/x: a part of this path is a file, not a folder: ",
		"/proc":                "/proc: is no cgroup; those of v2 are below " + v2 + ": ",
		"/proc/self/cmdline":   "/proc/self/cmdline: is no cgroup; ",
		filepath.Join(v1, "."): v1 + ": is of cgroup v1; those of v2 are below " + v2 + ": ",
	} {
		if v1 == "" && cgroup == "." {
			continue // a machine without v1
		}
		switch err := redirect.CheckCgroup(cgroup); {
		case want == "" && err != nil:
			t.Errorf("%q: %v", cgroup, err)
		case want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)):
			t.Errorf("%q\ngot  %v\nwant %s", cgroup, err, want)
		}
	}
}
