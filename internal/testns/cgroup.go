// SPDX-License-Identifier: Apache-2.0

package testns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// CgroupRoot is where cgroup v2 is mounted.
func CgroupRoot() (string, error) {
	data, err := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", errors.Join(err, errors.New("cgroup v2 is not mounted"))
}

// Cgroup makes a cgroup (v2) for the test's time. Those of a process are told apart
// by their names.
func Cgroup(t testing.TB, name string) (dir string) {
	t.Helper()
	root, err := CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(root, fmt.Sprintf("culvert-test-%d-%s", os.Getpid(), name))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
