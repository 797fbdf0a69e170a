// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	defaultBPFFS = "/sys/fs/bpf"
	lockFile     = "lock"
	podsDir      = "pods"
)

// takeLock makes this process the run directory's only one. The lock goes with
// the process, however that ends.
func takeLock(runDir string) (*os.File, error) {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	path := filepath.Join(runDir, lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock run directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder, _ := os.ReadFile(path)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another ztunnel runs with the run directory %s, process %s: stop it first, or give this one another runDir", runDir, strings.TrimSpace(string(holder)))
		}
		return nil, fmt.Errorf("lock run directory: %w", err)
	}
	if err := f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("write lock of run directory: %w", err)
	}
	return f, nil
}

// pinDir finds, and with create makes, the directory of this instance's pins.
func pinDir(cfg Config, create bool) (string, error) {
	root := cfg.BPFFS
	if root == "" {
		root = defaultBPFFS
	}
	var fs unix.Statfs_t
	err := unix.Statfs(root, &fs)
	if err == nil && fs.Type != unix.BPF_FS_MAGIC && create {
		if err = unix.Mount("bpf", root, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700"); err == nil {
			cfg.Logger.Info("mounted bpffs, it stays", "path", root)
			err = unix.Statfs(root, &fs)
		}
	}
	if err != nil {
		return "", fmt.Errorf("find bpffs at %s: %w: mount it with `mount -t bpf bpf %s`", root, err, root)
	}
	dir := filepath.Join(root, "culvert", instance(cfg.RunDir), layout)
	if fs.Type != unix.BPF_FS_MAGIC {
		if !create {
			return dir, nil // so nothing is pinned
		}
		return "", fmt.Errorf("find bpffs: %s is another file system: mount bpffs with `mount -t bpf bpf %s`", root, root)
	}
	if create {
		if err := os.MkdirAll(filepath.Join(dir, podsDir), 0o700); err != nil {
			return "", fmt.Errorf("make pin directory: %w", err)
		}
	}
	return dir, nil
}

// cgroupRoot finds where cgroup v2 is mounted: beside v1 it may be under
// /sys/fs/cgroup/unified.
func cgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup v2: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		// 36 35 98:0 /root /mount/point options … - type source options
		before, after, ok := strings.Cut(s.Text(), " - ")
		if fields := strings.Fields(before); ok && strings.HasPrefix(after, "cgroup2 ") && len(fields) >= 5 && fields[3] == "/" {
			return fields[4], nil
		}
	}
	return "", errors.New("find cgroup v2: it is not mounted here: mount it with `mount -t cgroup2 none /sys/fs/cgroup/unified`, and do not start ztunnel by `ip netns exec`, which hides it (use nsenter --net)")
}
