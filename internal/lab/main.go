// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Main is the TestMain of tests with real daemons: it has ztunnel name their
// binary, by the flag -ztunnel or built for the tests, sweeps what an earlier run
// with this prefix has left, and calls run. It returns what to exit with.
func Main(prefix string, ztunnel *string, run func() int) int {
	flag.StringVar(ztunnel, "ztunnel", "", "the `path` of a ztunnel, instead of building one")
	flag.Parse()
	code, err := prepared(prefix, ztunnel, run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func prepared(prefix string, ztunnel *string, run func() int) (code int, err error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("these tests make network namespaces and load BPF programs: run them as root (make test)")
	}
	if *ztunnel == "" {
		dir, err := os.MkdirTemp("", prefix)
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(dir)
		*ztunnel = filepath.Join(dir, "ztunnel")
		build := exec.Command("go", "build", "-trimpath", "-o", *ztunnel, "github.com/culvert-mesh/culvert/cmd/ztunnel")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("build ztunnel: %w\n%s", err, out)
		}
	}
	if _, err := Sweep(context.Background(), prefix); err != nil {
		return 0, fmt.Errorf("sweep: %w", err)
	}
	return run(), nil
}
