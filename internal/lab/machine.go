// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// CPU is the processor's name, for numbers that are measured here.
func CPU() string {
	data, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(data)) {
		if name, ok := strings.CutPrefix(line, "model name"); ok {
			return strings.TrimSpace(strings.TrimLeft(name, "\t :"))
		}
	}
	return "unknown CPU"
}

// Kernel is the running kernel's release.
func Kernel() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(name.Release[:])
}

// Commit is that of the source that lies here. It may be another user's.
func Commit() string {
	out, err := exec.Command("git", "-c", "safe.directory=*", "describe", "--always", "--dirty").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}
