//go:build oldkernel

// SPDX-License-Identifier: Apache-2.0

// Package vm is for machines of their own: init, initramfs and scripts/test-vm run
// the tests of other packages on kernels that are not this one's.
package vm

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-mesh/culvert/redirect"
)

// A kernel that is too old is named as the reason, and nothing is attached.
// scripts/test-vm runs this on one.
func TestOldKernelIsNamed(t *testing.T) {
	cfg := redirect.Config{RunDir: filepath.Join(t.TempDir(), "run")}
	n, err := redirect.Open(cfg)
	if err == nil {
		n.Close()
		_, _ = redirect.Cleanup(cfg)
		t.Fatal("this kernel is not too old")
	}
	t.Log(err)
	if !strings.Contains(err.Error(), "too old") || !strings.Contains(err.Error(), "5.18") {
		t.Error("the error does not name the kernel")
	}
	if report, err := redirect.Cleanup(cfg); err != nil {
		t.Errorf("clean up: %v, %v", report, err)
	}
}
