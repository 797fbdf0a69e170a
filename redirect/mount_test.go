// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Daemons that start at once where bpffs is not mounted do not mount it over
// each other: what the first has pinned would be out of sight.
func TestBPFFSIsMountedOnce(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("mounting bpffs needs root: run with sudo")
	}
	for range 20 {
		bpffs := t.TempDir()
		start := make(chan struct{})
		var wait sync.WaitGroup
		for range 8 {
			cfg := Config{RunDir: filepath.Join(t.TempDir(), "run"), BPFFS: bpffs}
			if err := cfg.setDefaults(); err != nil {
				t.Fatal(err)
			}
			wait.Go(func() {
				<-start
				if root, err := mountBPFFS(cfg); err != nil || root != bpffs {
					t.Errorf("mounted at %q, %v", root, err)
				}
			})
		}
		close(start)
		wait.Wait()
		mounts := 0
		for unix.Unmount(bpffs, 0) == nil {
			mounts++
		}
		if mounts != 1 {
			t.Fatalf("bpffs is mounted %d times", mounts)
		}
	}
}
