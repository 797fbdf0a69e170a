// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Cleanup takes away all that an instance has left in the kernel: hooks,
// programs, maps, and every pod's rules, routes and sysctls. It reports each. It
// refuses while a daemon runs, and goes on past errors.
func Cleanup(cfg Config) (report []string, err error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	lock, err := takeLock(cfg.RunDir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	var errs []error
	dirs := pinDirs(cfg)
	// First the hooks: what connects from now on is not captured any more.
	for _, dir := range dirs {
		for _, name := range hooks {
			if err := detach(filepath.Join(dir, name)); err == nil {
				report = append(report, "hook "+name+" detached")
			} else if !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	states, err := readStates(cfg.RunDir)
	errs = append(errs, err)
	for _, s := range states {
		done, err := s.undo(nil)
		report = append(report, done...)
		if err == nil {
			err = s.remove(cfg.RunDir)
		}
		errs = append(errs, err) // and kept, for another try
	}
	for _, dir := range dirs {
		done, err := removePins(dir)
		report = append(report, done...)
		errs = append(errs, err)
		// The directories above, as far as they are empty.
		_ = os.Remove(filepath.Dir(dir))
		_ = os.Remove(filepath.Dir(filepath.Dir(dir)))
	}
	for _, dir := range instanceDirs(cfg) {
		errs = append(errs, otherLayouts(dir))
	}
	if own := filepath.Join(cfg.RunDir, ownBPFFS); isBPFFS(own) && errors.Join(errs...) == nil {
		if err := unix.Unmount(own, 0); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", own, err))
		} else {
			report = append(report, own+" unmounted")
		}
	}
	if err := errors.Join(errs...); err != nil {
		return report, err
	}
	for _, name := range []string{podsDir, ownBPFFS, "admin.sock", lockFile} {
		_ = os.Remove(filepath.Join(cfg.RunDir, name))
	}
	_ = os.Remove(cfg.RunDir) // as far as it is empty
	return report, nil
}

// detach detaches a pinned link and removes its pin. Without the first, the
// kernel does it some time after the last handle is closed.
func detach(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("detach %s: %w", pin, err)
	}
	defer l.Close()
	if err := l.Detach(); err != nil {
		return fmt.Errorf("detach %s: %w", pin, err)
	}
	if err := os.Remove(pin); err != nil {
		return fmt.Errorf("remove pin: %w", err)
	}
	return nil
}

// removePins detaches every link below dir and removes every pin.
func removePins(dir string) (report []string, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(dir, path)
			if d.Name() == steerPin {
				err = detach(path)
			}
			report = append(report, "pin "+rel+" removed")
		}
		return err
	})
	return report, errors.Join(err, os.RemoveAll(dir))
}
