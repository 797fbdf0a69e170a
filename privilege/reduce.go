// SPDX-License-Identifier: Apache-2.0

package privilege

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// reduced is set, to its process's number, in the environment of a process that
// Reduce has started in the place of its own. It skips no check: it is what keeps a
// process that cannot be reduced from starting itself for ever.
const reduced = "CULVERT_REDUCED"

// Reduce leaves the process the needed capabilities and no others, forbids it to
// gain any, keeps its memory from other processes and from core files, and the files
// that it makes to itself. A process that has more is replaced by itself, under the
// same number: capabilities are each thread's own, and Go has started threads by
// now. Reduce then does not return. Call it before anything is begun.
//
// Its error names what is lacking, or what could not be taken away.
func Reduce() error {
	// A daemon that finds out later has pods that it cannot enrol.
	missing, err := Missing()
	if err != nil {
		return err
	}
	if missing != "" {
		return fmt.Errorf("the process lacks %s: %s", missing, Mend)
	}
	again := os.Getenv(reduced) == strconv.Itoa(os.Getpid())
	if err := os.Unsetenv(reduced); err != nil {
		return fmt.Errorf("reduce privileges: %w", err)
	}
	more, err := excess()
	switch {
	case err != nil:
		return fmt.Errorf("reduce privileges: %w", err)
	case more != "" && again:
		return fmt.Errorf("reduce privileges: after it the process still has %s", more)
	case more != "":
		return fmt.Errorf("reduce privileges: %w", restart())
	}
	if again {
		if err := rename(filepath.Base(os.Args[0])); err != nil {
			return fmt.Errorf("reduce privileges: %w", err)
		}
	}
	unix.Umask(0o077)
	// Last: /proc/self belongs to root from here on, whoever runs this.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("reduce privileges: make memory unreadable: %w", err)
	}
	return nil
}

// excess says what a thread of the process has beyond what it is to have; "" for
// nothing. The bounding set is not looked at: under no_new_privs the kernel gives
// nothing at execve that was not there before, whatever is in that
// (cap_bprm_creds_from_file in security/commoncap.c).
func excess() (string, error) {
	all, err := threads()
	if err != nil {
		return "", err
	}
	for _, t := range all {
		switch {
		case t.permitted != needed() || t.effective != needed():
			return "the capabilities " + t.permitted.String(), nil
		case t.inheritable != 0 || t.ambient != 0:
			return "capabilities to inherit: " + (t.inheritable | t.ambient).String(), nil
		case !t.noNewPrivs:
			return "the means to gain privileges at execve", nil
		}
	}
	return "", nil
}

// restart gives up what is not needed on one thread, and starts the program anew
// from there: all threads to come have what this one has.
func restart() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid new privileges: %w", err)
	}
	bounded, err := bound()
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range have {
		have[i].Inheritable = 0
		// Where the bounding set does it, the kernel takes them at execve, and a
		// program's file that root may execute by CAP_DAC_OVERRIDE only can be.
		if !bounded {
			have[i].Permitted &= uint32(needed() >> (32 * i))
			have[i].Effective = have[i].Permitted
		}
	}
	if err := unix.Capset(&header, &have[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	env := append(os.Environ(), reduced+"="+strconv.Itoa(os.Getpid()))
	return fmt.Errorf("start again with less: %w", unix.Exec("/proc/self/exe", os.Args, env))
}

// bound takes what is not needed from the thread's bounding set. It returns false
// where the thread may not, for want of CAP_SETPCAP.
func bound() (bool, error) {
	for c := range uint(64) {
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // the kernel knows no more
		}
		if err != nil {
			return false, fmt.Errorf("read bounding set of capabilities: %w", err)
		}
		if in == 0 || needed().has(c) {
			continue
		}
		err = unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		if errors.Is(err, unix.EPERM) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("reduce bounding set of capabilities: %w", err)
		}
	}
	return true, nil
}

// rename gives the threads the name that they would have without the restart: the
// kernel takes it from the path, which was /proc/self/exe. A thread has the name of
// the one that has made it, so that this is done once all that are listed have it.
func rename(name string) error {
	name = name[:min(len(name), 15)] // TASK_COMM_LEN, less a zero
	for again := true; again; {
		again = false
		paths, err := filepath.Glob("/proc/self/task/[0-9]*/comm")
		if err != nil {
			return err
		}
		for _, path := range paths {
			has, err := os.ReadFile(path)
			if err == nil && string(has) != name+"\n" {
				again = true
				err = os.WriteFile(path, []byte(name), 0)
			}
			if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("name threads: %w", err)
			}
		}
	}
	return nil
}
