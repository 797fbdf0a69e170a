// SPDX-License-Identifier: Apache-2.0

//go:build amd64 || arm64

package privilege

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// child names what this program does instead of its tests, in a process of its own:
// there is no way back from what is tested.
const child = "CULVERT_TEST_CHILD"

func TestMain(m *testing.M) {
	var err error
	switch name := os.Getenv(child); name {
	case "":
		os.Exit(m.Run())
	case "reduce":
		err = reduceAndTell()
	case "confine":
		err = confineAndTry(Mode(os.Getenv("MODE")))
	default:
		err = fmt.Errorf("no child %q", name)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test gives up capabilities: run it as root")
	}
}

// run runs this program as a child, from a thread that before has prepared and that
// ends.
func run(t *testing.T, before func() error, env ...string) (out []byte, err error) {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = &stderr
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		if err := before(); err != nil {
			done <- err
			return
		}
		var err error
		out, err = cmd.Output()
		done <- err
	}()
	if err := <-done; err != nil {
		return out, fmt.Errorf("%w: %s", err, stderr.Bytes())
	}
	return out, nil
}

func nothing() error { return nil }

// told is what a reduced child says of itself.
type told struct {
	PID      int
	Name     string
	Threads  []string // the name and the status of each, where they are not the same
	Bounding string
	Dumpable int
	Mask     int
	Marker   string
}

func reduceAndTell() error {
	// Threads that were there before.
	for range 4 {
		go func() {
			runtime.LockOSThread()
			select {}
		}()
	}
	if err := Reduce(); err != nil {
		return err
	}
	out := told{PID: os.Getpid(), Marker: os.Getenv(reduced), Mask: unix.Umask(0)}
	var err error
	if out.Dumpable, err = unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return err
	}
	paths, err := filepath.Glob("/proc/self/task/[0-9]*/status")
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var has []string
		for line := range strings.Lines(string(data)) {
			switch name, value, _ := strings.Cut(line, ":"); name {
			case "Name", "CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs":
				has = append(has, name+" "+strings.TrimSpace(value))
			case "CapBnd":
				out.Bounding = strings.TrimSpace(value)
			}
		}
		if s := strings.Join(has, ", "); !seen[s] {
			seen[s] = true
			out.Threads = append(out.Threads, s)
		}
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}

// mask is a set of capabilities as /proc writes it.
func mask(s capabilities) string { return fmt.Sprintf("%016x", uint64(s)) }

// drop takes capabilities from the thread's bounding set.
func drop(numbers ...uint) func() error {
	return func() (err error) {
		for _, n := range numbers {
			err = errors.Join(err, unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0))
		}
		return err
	}
}

func TestReduce(t *testing.T) {
	needRoot(t)
	own, err := threads()
	if err != nil {
		t.Fatal(err)
	}
	if own[0].effective&^needed() == 0 || own[0].noNewPrivs {
		t.Fatalf("control: this process has %s, no more than what is needed", own[0].effective)
	}
	name := filepath.Base(os.Args[0])
	name = name[:min(len(name), 15)] // TASK_COMM_LEN
	same := fmt.Sprintf("Name %s, CapInh %s, CapPrm %s, CapEff %[3]s, CapAmb %[2]s, NoNewPrivs 1", name, mask(0), mask(needed()))
	for name, c := range map[string]struct {
		before   func() error
		bounding capabilities // 0: any
	}{
		"from root": {nothing, needed()},
		// The bounding set has to stay, and what is permitted goes all the same.
		"without CAP_SETPCAP": {drop(unix.CAP_SETPCAP), 0},
		"with capabilities to inherit": {func() error {
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var have [2]unix.CapUserData
			err := unix.Capget(&header, &have[0])
			have[0].Inheritable = have[0].Permitted
			return errors.Join(err, unix.Capset(&header, &have[0]),
				unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, unix.CAP_CHOWN, 0, 0))
		}, needed()},
		"from what a unit of systemd leaves": {func() error {
			var rest []uint
			for n := range uint(unix.CAP_LAST_CAP + 1) {
				if !needed().has(n) {
					rest = append(rest, n)
				}
			}
			return errors.Join(drop(rest...)(), unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		}, needed()},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := run(t, c.before, child+"=reduce")
			if err != nil {
				t.Fatal(err)
			}
			var got told
			if err := json.Unmarshal(out, &got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{same}, got.Threads); diff != "" {
				t.Errorf("threads (-want +got):\n%s", diff)
			}
			if c.bounding != 0 && got.Bounding != mask(c.bounding) {
				t.Errorf("bounding set: %s, want %s", got.Bounding, mask(c.bounding))
			}
			if got.Dumpable != 0 || got.Mask != 0o077 || got.Marker != "" {
				t.Errorf("dumpable %d, mask of files %#o, marker %q", got.Dumpable, got.Mask, got.Marker)
			}
		})
	}
}

// Who says of a process that it is reduced, when it is not, gets an error.
func TestReduceBelievesNoMarker(t *testing.T) {
	needRoot(t)
	for name, script := range map[string]string{
		"its own number":   `export ` + reduced + `=$$; exec "$0"`,
		"another's number": `export ` + reduced + `=1; exec "$0"`,
	} {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", script, os.Args[0])
		cmd.Env = append(os.Environ(), child+"=reduce")
		out, err := cmd.CombinedOutput()
		if name == "its own number" {
			if err == nil || !strings.Contains(string(out), "still has the capabilities CAP_NET_ADMIN") {
				t.Errorf("%s: %v, %s", name, err, out)
			}
		} else if err != nil {
			t.Errorf("control: %s: %v, %s", name, err, out)
		}
	}
}

// tries are system calls that a daemon has no need of, each with what is wrong of it
// where it is not refused: nothing, or another error than EPERM.
func tries() map[string]func() error {
	raw := func(call uintptr, arguments ...uintptr) error {
		a := make([]uintptr, 3)
		copy(a, arguments)
		if _, _, errno := unix.Syscall(call, a[0], a[1], a[2]); errno != 0 {
			return errno
		}
		return nil
	}
	socket := func(domain, kind, protocol int) error {
		fd, err := unix.Socket(domain, kind, protocol)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	return map[string]func() error{
		"start a program":         func() error { return raw(unix.SYS_EXECVE) },
		"mount":                   func() error { return raw(unix.SYS_MOUNT) },
		"trace":                   func() error { return raw(unix.SYS_PTRACE, unix.PTRACE_CONT, 1<<22+1) },
		"make a namespace":        func() error { return raw(unix.SYS_UNSHARE, unix.CLONE_NEWUTS) },
		"enter a mount namespace": func() error { return raw(unix.SYS_SETNS, 1<<20, unix.CLONE_NEWNS) },
		"hide a thread's flags":   func() error { return raw(unix.SYS_CLONE3, 0, 0) },
		"map code":                func() error { return raw(unix.SYS_MPROTECT, 1, 1, unix.PROT_EXEC) },
		"read packets":            func() error { return socket(unix.AF_PACKET, unix.SOCK_RAW, 0) },
		"make packets":            func() error { return socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW) },
		"reach netfilter":         func() error { return socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER) },
		"signal another":          func() error { return unix.Kill(1<<22+1, 0) },
	}
}

// confineAndTry says what became of each try: on a thread that was there before, and
// on others.
func confineAndTry(mode Mode) error {
	type result map[string]string
	try := func() result {
		out := result{}
		for name, f := range tries() {
			out[name] = "done"
			if err := f(); err != nil {
				out[name] = err.Error()
			}
		}
		return out
	}
	start, old := make(chan bool), make(chan result)
	go func() {
		runtime.LockOSThread()
		old <- nil
		<-start
		old <- try()
	}()
	<-old
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if err := Confine(mode); err != nil {
		return err
	}
	close(start)
	if err := work(); err != nil {
		return fmt.Errorf("work: %w", err)
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]result{"old": <-old, "new": try()})
}

// work has Go's runtime and library do what a daemon may ask of them.
func work() error {
	var wg sync.WaitGroup
	for range 8 { // new threads
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			_ = make([]byte, 1<<20)
			time.Sleep(time.Millisecond)
		})
	}
	wg.Wait()
	runtime.GC()
	var profile bytes.Buffer
	if err := pprof.StartCPUProfile(&profile); err != nil {
		return err
	}
	for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); {
	}
	pprof.StopCPUProfile()
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGHUP)
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		return err
	}
	<-caught
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			c.Close()
		}
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "a")
	return errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o400), os.Rename(path, path+"b"), os.Symlink("b", path), os.Remove(path+"b"))
}

func TestConfine(t *testing.T) {
	needRoot(t)
	results := map[Mode]map[string]map[string]string{}
	for _, mode := range []Mode{Enforce, Log, Disabled} {
		out, err := run(t, nothing, child+"=confine", "MODE="+string(mode))
		if err != nil {
			t.Fatalf("%s: %v", mode, err)
		}
		var got map[string]map[string]string
		if err := json.Unmarshal(out, &got); err != nil {
			t.Fatal(err)
		}
		results[mode] = got
	}
	for name := range tries() {
		want := unix.EPERM.Error()
		if name == "hide a thread's flags" {
			want = unix.ENOSYS.Error()
		}
		for _, threads := range []string{"old", "new"} {
			if got := results[Enforce][threads][name]; got != want {
				t.Errorf("%s, on %s threads: %s, want %s", name, threads, got, want)
			}
			without := results[Disabled][threads][name]
			if without == want {
				t.Errorf("control: %s fails without a filter too: %s", name, without)
			}
			if got := results[Log][threads][name]; got != without {
				t.Errorf("%s, to be logged, on %s threads: %s, and without a filter: %s", name, threads, got, without)
			}
		}
	}
}
