// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// podState is what is written down of a pod, so that a later process can
// release it.
type podState struct {
	Name      string            `json:"name"`
	NetnsPath string            `json:"netns"`
	Cookie    uint64            `json:"cookie"` // of the namespace: the path may lead elsewhere by then
	Inode     uint64            `json:"inode"`  // likewise, in nsfs
	V4        netip.Addr        `json:"v4"`
	V6        netip.Addr        `json:"v6"`
	Sysctls   map[string]string `json:"sysctls"` // as they were
}

func statePath(runDir, name string) string {
	return filepath.Join(runDir, podsDir, podFile(name)+".json")
}

// Enrolled says how many pods an instance has enrolled, by what it has written
// down: they stay so when it ends.
func Enrolled(runDir string) int {
	states, _ := readStates(runDir)
	return len(states)
}

// readStates reads what was written down of all pods. One that cannot be read
// does not hide the others.
func readStates(runDir string) ([]podState, error) {
	paths, err := filepath.Glob(filepath.Join(runDir, podsDir, "*.json"))
	errs := []error{err}
	var out []podState
	for _, path := range paths {
		s, err := readStateFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // released meanwhile
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, s)
	}
	return out, errors.Join(errs...)
}

func readStateFile(path string) (podState, error) {
	var s podState
	data, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, fmt.Errorf("read state of a pod, %s: %w", path, err)
	}
	return s, nil
}

func (s podState) write(runDir string) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("write state of pod: %w", err)
	}
	path := statePath(runDir, s.Name)
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write state of pod: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write state of pod: %w", err)
	}
	return nil
}

func (s podState) remove(runDir string) error {
	if s.Name == "" {
		return nil
	}
	if err := os.Remove(statePath(runDir, s.Name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove state of pod: %w", err)
	}
	return nil
}

// fdPath is where a namespace's handle is found as a file.
func fdPath(ns *netns.NS) string { return fmt.Sprintf("/proc/self/fd/%d", ns.FD()) }

func inode(ns *netns.NS) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(fdPath(ns), &st); err != nil {
		return 0, fmt.Errorf("look at network namespace: %w", err)
	}
	return st.Ino, nil
}

// find opens the pod's namespace: where it was, or where it is now, named
// otherwise or held by a process; nil when it is nowhere.
func (s podState) find() (*netns.NS, error) {
	paths := []string{s.NetnsPath}
	for _, pattern := range []string{filepath.Join(netns.Dir, "*"), "/proc/[0-9]*/ns/net"} {
		more, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		paths = append(paths, more...)
	}
	for _, path := range paths {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Ino != s.Inode {
			continue
		}
		ns, err := netns.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if ns.Cookie() == s.Cookie {
			return ns, nil
		}
		ns.Close()
	}
	return nil, nil
}

// undo removes rules and routes and restores the sysctls, and says what it did.
// ns is the pod's namespace, or nil: it is looked for.
func (s podState) undo(ns *netns.NS) (report []string, err error) {
	if ns == nil {
		if ns, err = s.find(); err != nil {
			return nil, fmt.Errorf("release pod %s: %w", s.Name, err)
		}
		if ns == nil {
			return []string{fmt.Sprintf("pod %s: its namespace is gone", s.Name)}, nil
		}
		defer ns.Close()
	}
	err = ns.Do(func() error {
		var errs []error
		for _, a := range []netip.Addr{s.V4, s.V6} {
			if !a.IsValid() {
				continue
			}
			done, err := removeRouting(a)
			report = append(report, done...)
			errs = append(errs, err)
		}
		for key, value := range s.Sysctls {
			if err := writeSysctl(key, value); err != nil {
				errs = append(errs, err)
				continue
			}
			report = append(report, fmt.Sprintf("sysctl %s restored to %s", key, value))
		}
		return errors.Join(errs...)
	})
	slices.Sort(report)
	for i := range report {
		report[i] = "pod " + s.Name + ": " + report[i]
	}
	return report, err
}

// Sysctl is a setting of a pod's namespace.
type Sysctl struct {
	Key, Value string // a path below /proc/sys, and what it is to have
	Why        string
	Optional   bool // a kernel without it needs none
}

// Sysctls are those of a pod with IPv4; v6: and IPv6.
func Sysctls(v6 bool) []Sysctl {
	all := []Sysctl{
		{"net/ipv4/tcp_fwmark_accept", "1", "an application's accepted socket takes the delivery's mark, so its answers return over lo", false},
		{"net/ipv4/fwmark_reflect", "1", "and so do its resets", false},
		{"net/mptcp/enabled", "0", "MPTCP sockets pass the connect hooks by", true},
	}
	if v6 {
		all = append(all, Sysctl{"net/ipv6/fwmark_reflect", "1", "resets of IPv6 return over lo", false})
	}
	return all
}

// readSysctls reads the present values, on a thread in the namespace.
func readSysctls(v6 bool) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range Sysctls(v6) {
		data, err := os.ReadFile(filepath.Join("/proc/sys", s.Key))
		if errors.Is(err, fs.ErrNotExist) && s.Optional {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read sysctl: %w", err)
		}
		out[s.Key] = strings.TrimSpace(string(data))
	}
	return out, nil
}

func setSysctls(v6 bool) error {
	for _, s := range Sysctls(v6) {
		err := writeSysctl(s.Key, s.Value)
		if errors.Is(err, fs.ErrNotExist) && s.Optional {
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func writeSysctl(key, value string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0o644); err != nil {
		return fmt.Errorf("set sysctl %s: %w", key, err)
	}
	return nil
}
