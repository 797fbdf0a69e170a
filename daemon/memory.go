// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
)

const (
	// memoryShare is how much of the cgroup's limit Go may use, in percent. The
	// rest is for what Go does not count: stacks of threads, and of the kernel's
	// what it charges to the cgroup (BPF maps, socket buffers).
	memoryShare = 90
	// noMemoryLimit is where a number means none: of v1 it is 2^63 less a page.
	noMemoryLimit = 1 << 60
)

// limitMemory has Go keep to the memory that the process's cgroup may use: it
// collects more often before the kernel would kill it. GOMEMLIMIT wins. It returns
// what is in force; 0: no limit.
func limitMemory(log *slog.Logger) int64 {
	if set := os.Getenv("GOMEMLIMIT"); set != "" {
		log.Info("memory is limited by GOMEMLIMIT", "limit", set)
		return memoryLimit()
	}
	limit, at, err := cgroupMemory("/proc/self")
	if err != nil {
		log.Warn("cannot find the memory limit of the cgroup: none is kept to", "err", err, "hint", "set GOMEMLIMIT")
		return memoryLimit()
	}
	if limit == 0 {
		return memoryLimit()
	}
	debug.SetMemoryLimit(limit / 100 * memoryShare)
	log.Info("memory is limited by the cgroup", "cgroup", at, "cgroup_limit", limit, "limit", memoryLimit())
	return memoryLimit()
}

// memoryLimit is what Go keeps to, in bytes; 0: no limit.
func memoryLimit() int64 {
	if n := debug.SetMemoryLimit(-1); n != math.MaxInt64 {
		return n
	}
	return 0
}

// cgroupMemory finds the tightest memory limit among the cgroups of the process
// that proc is of, and those above them, in v2 and in v1. 0: there is none.
func cgroupMemory(proc string) (limit int64, at string, err error) {
	member, err := os.ReadFile(filepath.Join(proc, "cgroup"))
	if err != nil {
		return 0, "", fmt.Errorf("find cgroups: %w", err)
	}
	mounts, err := os.ReadFile(filepath.Join(proc, "mountinfo"))
	if err != nil {
		return 0, "", fmt.Errorf("find cgroups: %w", err)
	}
	for line := range strings.Lines(string(member)) {
		// 4:memory:/path, of v2 0::/path
		number, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, path, ok := strings.Cut(rest, ":")
		v2 := number == "0" && controllers == ""
		if !ok || !v2 && !listed(controllers, "memory") {
			continue
		}
		file := "memory.limit_in_bytes"
		if v2 {
			file = "memory.max"
		}
		top, dir := cgroupDir(string(mounts), path, v2)
		if top == "" {
			continue // not mounted here
		}
		for {
			n, err := readMemory(filepath.Join(dir, file))
			if err != nil {
				return 0, "", err
			}
			if n != 0 && (limit == 0 || n < limit) {
				limit, at = n, dir
			}
			if dir == top {
				break
			}
			dir = filepath.Dir(dir)
		}
	}
	return limit, at, nil
}

// cgroupDir is where a cgroup's directory is, and where that of the topmost that
// can be seen. A container sees its own alone, mounted as the top.
func cgroupDir(mounts, path string, v2 bool) (top, dir string) {
	for line := range strings.Lines(mounts) {
		// 36 35 98:0 /root /mount/point options … - type source options
		before, after, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		fields, tail := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(tail) < 3 {
			continue
		}
		if v2 && tail[0] != "cgroup2" || !v2 && (tail[0] != "cgroup" || !listed(tail[2], "memory")) {
			continue
		}
		root, top := fields[3], fields[4]
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
			rel = "." // the path is of another view than the mount
		}
		return top, filepath.Join(top, rel)
	}
	return "", ""
}

// listed says whether a word is in a list with commas.
func listed(list, word string) bool {
	for w := range strings.SplitSeq(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}

// readMemory reads a limit in bytes; 0: none. The root of v2, and a cgroup without
// the controller, have no such file.
func readMemory(path string) (int64, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read memory limit: %w", err)
	}
	text := strings.TrimSpace(string(data))
	if text == "max" {
		return 0, nil
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read memory limit: %s: %w", path, err)
	}
	if n >= noMemoryLimit {
		return 0, nil
	}
	return int64(n), nil
}
