// SPDX-License-Identifier: Apache-2.0

// Package testns makes network namespaces and cgroups for tests.
package testns

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// New makes a namespace for the test's time, with lo up.
func New(t testing.TB) *netns.NS {
	t.Helper()
	ns, _ := Named(t)
	err := ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// Named makes a namespace for the test's time, as the kernel makes it, and says its
// name.
func Named(t testing.TB) (*netns.NS, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces: run it as root")
	}
	name := fmt.Sprintf("culvert-test-%d-%x", os.Getpid(), time.Now().UnixNano()&0xffffff)
	ns, err := netns.CreateNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(ns.Close(), netns.DeleteNamed(name)); err != nil {
			t.Error(err)
		}
	})
	return ns, name
}
