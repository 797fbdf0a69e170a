// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// journal is an append-only list of what a lab has made, one JSON array of words a line, written before the thing is
// made (a process: right after). Its reader must not mind what is not there.
type journal struct {
	mu sync.Mutex // one line at a time
	f  *os.File
}

const journalName = "journal"

func openJournal(dir string) (*journal, error) {
	f, err := os.OpenFile(filepath.Join(dir, journalName), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	j := &journal{f: f}
	if err := j.addProcess("owner", os.Getpid()); err != nil {
		f.Close()
		return nil, err
	}
	return j, nil
}

func (j *journal) add(words ...string) error {
	line, err := json.Marshal(words)
	if err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, err := j.f.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	return nil
}

func (j *journal) addProcess(word string, pid int) error {
	start, err := startTime(pid)
	if err != nil {
		return err
	}
	return j.add(word, strconv.Itoa(pid), start)
}

func (j *journal) Close() error { return j.f.Close() }

func readJournal(dir string) ([][]string, error) {
	b, err := os.ReadFile(filepath.Join(dir, journalName))
	if err != nil {
		return nil, err
	}
	var out [][]string
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		var words []string
		if json.Unmarshal(s.Bytes(), &words) == nil && len(words) > 1 { // the last line may be half of one
			out = append(out, words)
		}
	}
	return out, nil
}

// startTime returns when a process was started (clock ticks since boot, proc_pid_stat(5), field 22): together with the
// pid it names one process for ever.
func startTime(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// Fields are counted from behind the command's closing bracket: the command itself may hold anything.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	const stateField, startField = 3, 22
	if len(fields) <= startField-stateField {
		return "", fmt.Errorf("read start time of %d: short stat", pid)
	}
	if fields[0] == "Z" {
		return "", fmt.Errorf("read start time of %d: %w", pid, fs.ErrNotExist)
	}
	return fields[startField-stateField], nil
}

// alive reports whether the process that was written down still runs.
func alive(words []string) (int, bool) {
	if len(words) < 3 {
		return 0, false
	}
	pid, err := strconv.Atoi(words[1])
	if err != nil {
		return 0, false
	}
	start, err := startTime(pid)
	return pid, err == nil && start == words[2]
}

// Sweep removes the labs of a prefix whose maker no longer runs, and says which they were.
func Sweep(ctx context.Context, prefix string) (removed []string, err error) {
	dirs, err := filepath.Glob(filepath.Join(StateDir, prefix+"-*"))
	if err != nil {
		return nil, fmt.Errorf("sweep labs: %w", err)
	}
	var errs []error
	for _, dir := range dirs {
		// <prefix>-<id>: of the labs of the prefix "a", those of "a-b" are none.
		if id := strings.TrimPrefix(filepath.Base(dir), prefix+"-"); strings.Contains(id, "-") {
			continue
		}
		entries, err := readJournal(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
			continue
		}
		if i := slices.IndexFunc(entries, func(w []string) bool { return w[0] == "owner" }); i >= 0 {
			if _, running := alive(entries[i]); running {
				continue
			}
		}
		removed = append(removed, filepath.Base(dir))
		errs = append(errs, undo(ctx, dir))
	}
	if err := errors.Join(errs...); err != nil {
		return removed, fmt.Errorf("sweep labs: %w", err)
	}
	return removed, nil
}

// undo removes what a journal lists: processes first, then what the daemons left in the kernel, then namespaces. It goes
// on past errors; the directory is removed only when there were none, so that a failed sweep can be tried again.
func undo(ctx context.Context, dir string) error {
	entries, err := readJournal(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var errs []error
	for _, word := range []string{"process", "cleanup", "netns", "cgroup"} {
		for _, e := range slices.Backward(entries) {
			if e[0] != word {
				continue
			}
			switch word {
			case "process":
				errs = append(errs, end(ctx, e))
			case "cleanup":
				errs = append(errs, runCleanup(ctx, e[1:]))
			case "netns":
				if _, err := os.Stat(filepath.Join(netnsDir, e[1])); err != nil {
					continue
				}
				if err := netns.DeleteNamed(e[1]); err != nil {
					errs = append(errs, fmt.Errorf("delete namespace %s: %w", e[1], err))
				}
			case "cgroup":
				errs = append(errs, removeCgroup(ctx, e[1]))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w; %s is kept for another try", err, dir)
	}
	return os.RemoveAll(dir)
}

// end kills a process that was written down and waits until it is gone.
func end(ctx context.Context, words []string) error {
	pid, running := alive(words)
	if !running {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // gone meanwhile
	}
	defer unix.Close(fd)
	if _, running := alive(words); !running { // now the descriptor names it, not the number
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	const patience = 5 * time.Second
	polls := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline) && ctx.Err() == nil; {
		if n, _ := unix.Poll(polls, 100); n > 0 {
			return nil
		}
	}
	return fmt.Errorf("kill process %d: it does not end", pid)
}

// runCleanup runs the command that takes a daemon's programs, pins and rules away.
func runCleanup(ctx context.Context, argv []string) error {
	if _, err := exec.LookPath(argv[0]); err != nil {
		return fmt.Errorf("clean up after a daemon: %w; build it again, or run %q with another one", err, argv)
	}
	const patience = 20 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("clean up after a daemon: run %q: %w: %s", argv, err, bytes.TrimSpace(out))
	}
	return nil
}
