// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// Cleanup takes away all that an instance has left in the kernel: hooks,
// programs, maps, and every pod's rules, routes and sysctls. It reports each. It
// refuses while a daemon runs, and goes on past errors.
func Cleanup(cfg Config) (report []string, err error) {
	if cfg.RunDir == "" {
		cfg.RunDir = "/run/culvert"
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if _, err := os.Stat(cfg.RunDir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil // it never ran
	}
	lock, err := takeLock(cfg.RunDir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	pins, err := pinDir(cfg, false)
	if err != nil {
		return nil, err
	}
	var errs []error
	// First the hooks: what connects from now on is not captured any more.
	for _, name := range []string{"connect4", "connect6"} {
		if err := os.Remove(filepath.Join(pins, name)); err == nil {
			report = append(report, "hook "+name+" detached")
		} else if !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("detach %s: %w", name, err))
		}
	}
	states, err := filepath.Glob(filepath.Join(cfg.RunDir, podsDir, "*.json"))
	errs = append(errs, err)
	for _, path := range states {
		done, err := cleanPod(path)
		report = append(report, done...)
		if err != nil {
			errs = append(errs, err)
			continue // kept, for another try
		}
		errs = append(errs, os.Remove(path))
	}
	removed, err := removePins(pins)
	report = append(report, removed...)
	errs = append(errs, err)
	// The instance's own directories, as far as they are empty.
	for _, dir := range []string{filepath.Dir(pins), filepath.Dir(filepath.Dir(pins)), filepath.Join(cfg.RunDir, podsDir)} {
		_ = os.Remove(dir)
	}
	if err := errors.Join(errs...); err != nil {
		return report, err
	}
	for _, name := range []string{"admin.sock", lockFile} {
		_ = os.Remove(filepath.Join(cfg.RunDir, name))
	}
	_ = os.Remove(cfg.RunDir)
	return report, nil
}

// cleanPod releases a pod by what was written down of it.
func cleanPod(path string) ([]string, error) {
	s, err := readStateFile(path)
	if err != nil {
		return nil, err
	}
	ns, err := netns.Open(s.NetnsPath)
	if errors.Is(err, fs.ErrNotExist) {
		return []string{fmt.Sprintf("pod %s: its namespace is gone", s.Name)}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("release pod %s: %w", s.Name, err)
	}
	defer ns.Close()
	if ns.Cookie() != s.Cookie {
		return []string{fmt.Sprintf("pod %s: its namespace is gone, another one is at %s", s.Name, s.NetnsPath)}, nil
	}
	done, err := s.undo(ns)
	for i := range done {
		done[i] = "pod " + s.Name + ": " + done[i]
	}
	if err != nil {
		err = fmt.Errorf("release pod %s: %w", s.Name, err)
	}
	return done, err
}

// removePins removes every pin below dir; a program goes with its last link.
func removePins(dir string) (report []string, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(dir, path)
			report = append(report, "pin "+rel+" removed")
		}
		return err
	})
	return report, errors.Join(err, os.RemoveAll(dir))
}
