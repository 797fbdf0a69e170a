// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
)

// tree writes files below a new folder, in whose content DIR is that folder.
func tree(t *testing.T, content map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range content {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIR", dir)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const (
	mountV2     = "35 25 0:30 / DIR/v2 rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
	mountV1     = "31 24 0:26 / DIR rw - tmpfs tmpfs ro,mode=755\n36 31 0:31 / DIR/memory rw - cgroup cgroup rw,memory\n"
	mountHybrid = mountV1 + "37 31 0:32 / DIR/cpu rw - cgroup cgroup rw,cpu,cpuacct\n" + mountV2
	none1       = "9223372036854771712\n"
)

func TestCgroupMemory(t *testing.T) {
	for name, tt := range map[string]struct {
		tree  map[string]string
		limit int64
		at    string
	}{
		"v2": {map[string]string{"mountinfo": mountV2, "cgroup": "0::/a/b\n",
			"v2/a/memory.max": "max\n", "v2/a/b/memory.max": "1000000\n"}, 1000000, "v2/a/b"},
		"v2, above it": {map[string]string{"mountinfo": mountV2, "cgroup": "0::/a/b/c\n",
			"v2/a/memory.max": "500000\n", "v2/a/b/memory.max": "1000000\n", "v2/a/b/c/memory.max": "max\n"}, 500000, "v2/a"},
		"v2, none":                   {map[string]string{"mountinfo": mountV2, "cgroup": "0::/a\n", "v2/a/memory.max": "max\n"}, 0, ""},
		"v2, without the controller": {map[string]string{"mountinfo": mountV2, "cgroup": "0::/a\n", "v2/a/cgroup.procs": ""}, 0, ""},
		"v2, a container that sees its own as the top": {map[string]string{"mountinfo": mountV2, "cgroup": "0::/\n",
			"v2/memory.max": "700000\n"}, 700000, "v2"},
		"v1": {map[string]string{"mountinfo": mountV1, "cgroup": "5:cpu,cpuacct:/x\n4:memory:/a\n",
			"memory/memory.limit_in_bytes": none1, "memory/a/memory.limit_in_bytes": "600000\n"}, 600000, "memory/a"},
		"v1, none": {map[string]string{"mountinfo": mountV1, "cgroup": "4:memory:/a\n",
			"memory/memory.limit_in_bytes": none1, "memory/a/memory.limit_in_bytes": none1}, 0, ""},
		"v1, a container without a namespace of cgroups": {map[string]string{"cgroup": "4:memory:/kubepods/pod1/c1\n",
			"mountinfo":                    "36 31 0:31 /kubepods/pod1/c1 DIR/memory ro - cgroup cgroup rw,memory\n",
			"memory/memory.limit_in_bytes": "400000\n"}, 400000, "memory"},
		"v1, mounted from elsewhere": {map[string]string{"cgroup": "4:memory:/\n",
			"mountinfo":                    "36 31 0:31 /../.. DIR/memory ro - cgroup cgroup rw,memory\n",
			"memory/memory.limit_in_bytes": "300000\n"}, 300000, "memory"},
		"both, the tighter one": {map[string]string{"mountinfo": mountHybrid, "cgroup": "4:memory:/a\n0::/b\n",
			"memory/a/memory.limit_in_bytes": "600000\n", "v2/b/memory.max": "200000\n"}, 200000, "v2/b"},
		"both, of v1 alone": {map[string]string{"mountinfo": mountHybrid, "cgroup": "4:memory:/a\n0::/\n",
			"memory/a/memory.limit_in_bytes": "600000\n"}, 600000, "memory/a"},
		"not mounted": {map[string]string{"mountinfo": "31 24 0:26 / / rw - ext4 /dev/vda rw\n", "cgroup": "0::/a\n"}, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := tree(t, tt.tree)
			limit, at, err := cgroupMemory(dir)
			if err != nil {
				t.Fatal(err)
			}
			want := tt.at
			if want != "" {
				want = filepath.Join(dir, want)
			}
			if limit != tt.limit || at != want {
				t.Errorf("%d at %q, want %d at %q", limit, at, tt.limit, want)
			}
		})
	}
	for name, content := range map[string]map[string]string{
		"no list of cgroups": {"mountinfo": mountV2},
		"no list of mounts":  {"cgroup": "0::/a\n"},
		"no number":          {"mountinfo": mountV2, "cgroup": "0::/a\n", "v2/a/memory.max": "much\n"},
	} {
		if limit, _, err := cgroupMemory(tree(t, content)); err == nil {
			t.Errorf("%s: %d, and no error", name, limit)
		}
	}
}

// GOMEMLIMIT is the operator's word.
func TestMemoryLimitOfTheEnvironmentWins(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	t.Cleanup(func() { debug.SetMemoryLimit(before) })
	debug.SetMemoryLimit(1 << 40) // as the runtime does at its start
	t.Setenv("GOMEMLIMIT", "1TiB")
	var log bytes.Buffer
	if n := limitMemory(slog.New(slog.NewTextHandler(&log, nil))); n != 1<<40 || !strings.Contains(log.String(), "GOMEMLIMIT") {
		t.Errorf("%d is in force; the log says: %s", n, &log)
	}
}
