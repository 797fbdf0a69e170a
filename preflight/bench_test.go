// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/config"
)

// What a daemon's start pays. The features that the first round has probed are
// remembered, so that -benchtime=1x tells of a process that has just begun.
func BenchmarkStart(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Fatal("the checks need root")
	}
	cfg := config.Default(b.TempDir())
	cfg.RunDir = filepath.Join(b.TempDir(), "run")
	before := used(b)
	for b.Loop() {
		if err := Start(b.Context(), cfg, slog.New(slog.DiscardHandler)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(used(b)-before)/float64(b.N)/float64(time.Millisecond), "cpu-ms/op")
}

// used is the time of CPU that the process has used.
func used(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
