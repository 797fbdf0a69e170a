// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CgroupRoot returns where cgroup v2 is mounted; empty: nowhere.
func CgroupRoot() string {
	b, _ := os.ReadFile("/proc/mounts")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	return ""
}

func (l *Lab) makeCgroup() error {
	root := CgroupRoot()
	if root == "" {
		return errors.New("cgroup v2 is not mounted here")
	}
	dir := filepath.Join(root, l.ID)
	if err := l.journal.add("cgroup", dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	l.cgroup = dir
	return nil
}

// removeCgroup kills what is still in it, children of the lab's processes, and waits for them: they leave their cgroup
// a little later.
func removeCgroup(ctx context.Context, dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("end what is in cgroup %s: %w", dir, err)
	}
	const patience = 5 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return Until(ctx, "cgroup "+dir+" is empty", func() error {
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		return nil
	})
}
