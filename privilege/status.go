// SPDX-License-Identifier: Apache-2.0

package privilege

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// thread is what the kernel says that a thread may do, proc_pid_status(5).
type thread struct {
	inheritable, permitted, effective, ambient capabilities

	noNewPrivs bool
}

// status reads a status file of /proc.
func status(path string) (t thread, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return t, fmt.Errorf("read what the process may do: %w", err)
	}
	sets := map[string]*capabilities{"CapInh": &t.inheritable, "CapPrm": &t.permitted, "CapEff": &t.effective, "CapAmb": &t.ambient}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		value = strings.TrimSpace(value)
		if set := sets[name]; set != nil {
			n, err := strconv.ParseUint(value, 16, 64)
			if err != nil {
				return t, fmt.Errorf("read what the process may do: %s: %s: %w", path, name, err)
			}
			*set = capabilities(n)
			delete(sets, name)
		}
		if name == "NoNewPrivs" {
			t.noNewPrivs = value == "1"
		}
	}
	if len(sets) > 0 {
		return t, fmt.Errorf("read what the process may do: %s has no capabilities in it", path)
	}
	return t, nil
}

// threads reads the status of each thread of the process.
func threads() ([]thread, error) {
	paths, err := filepath.Glob("/proc/self/task/[0-9]*/status")
	if err != nil {
		return nil, err
	}
	var out []thread
	for _, path := range paths {
		t, err := status(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // has ended
		}
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	if len(out) == 0 {
		return nil, errors.New("read what the process may do: /proc lists no threads: is it mounted?")
	}
	return out, nil
}

// Capabilities names the capabilities that the process has.
func Capabilities() (string, error) {
	t, err := status("/proc/self/status")
	return t.permitted.String(), err
}
