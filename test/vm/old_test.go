//go:build oldkernel

// SPDX-License-Identifier: Apache-2.0

// Package vm is for machines of their own: init, initramfs and scripts/test-vm run
// the tests of other packages on kernels that are not this one's.
package vm

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/preflight"
)

// A kernel that is too old is named as the reason, before anything is attached.
// scripts/test-vm runs this on one.
func TestOldKernelIsNamed(t *testing.T) {
	cfg := config.Default(t.TempDir())
	cfg.RunDir = filepath.Join(t.TempDir(), "run")
	err := preflight.Start(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err == nil {
		t.Fatal("this kernel is not too old")
	}
	t.Log(err)
	if !strings.Contains(err.Error(), "too old") || !strings.Contains(err.Error(), "5.18") {
		t.Error("the error does not name the kernel")
	}
}
