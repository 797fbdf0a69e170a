// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/admin"
)

// answering serves an admin socket, and returns its run folder.
func answering(t *testing.T, path string, answer http.HandlerFunc) string {
	t.Helper()
	dir := t.TempDir()
	s, err := admin.Listen(t.Context(), admin.Socket(dir), admin.Mount{Pattern: path, Handler: answer})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestKilledDaemon: it leaves its socket.
func TestKilledDaemon(t *testing.T) {
	dir := t.TempDir()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: admin.Socket(dir)}); err != nil {
		t.Fatal(err)
	}
	syscall.Close(fd)
	if _, _, stderr := call(t, "status", "--run-dir", dir); !strings.Contains(stderr, "no ztunnel answers at "+dir) {
		t.Error(stderr)
	}
}

// TestAskingUnprivileged needs root, to be somebody else.
func TestAskingUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	bin := build(t)
	dir := answering(t, "/status", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") })
	// What holds the test's folders is for its user only.
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"status"}, {"log-level", "debug"}, {"bugreport", "--out", "-"}} {
		cmd := exec.Command(bin, append(args, "--run-dir", dir)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if want := fmt.Sprintf("needs root, runs as user %d: use sudo", 65534); err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%v: no %q in\n%s", args, want, out)
		}
	}
}

// TestReportAsksAtOnce: a daemon that is stuck keeps a report no longer than one
// answer may take. Here none of those that the report asks for comes before all are
// asked for.
func TestReportAsksAtOnce(t *testing.T) {
	const asked = 8 // beside the profiler's; the status also for the configuration and the cgroup
	var mu sync.Mutex
	paths, all := map[string]bool{}, make(chan struct{})
	dir := answering(t, "/", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		if !paths[r.URL.Path] {
			paths[r.URL.Path] = true
			if len(paths) == asked {
				close(all)
			}
		}
		mu.Unlock()
		select {
		case <-all:
			io.WriteString(w, "{}")
		case <-r.Context().Done():
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	a := newAsker(&cobra.Command{})
	*a.runDir = dir
	if err := bugreport(ctx, io.Discard, a, "report"); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(paths) != asked || ctx.Err() != nil {
		t.Errorf("asked for %v until %v", slices.Sorted(maps.Keys(paths)), ctx.Err())
	}
}

// TestWatch: each look is shown, also beyond one that fails, until SIGINT, which is
// no failure.
func TestWatch(t *testing.T) {
	var asked atomic.Int64
	dir := answering(t, "/workloads", func(w http.ResponseWriter, _ *http.Request) {
		n := asked.Add(1)
		if n == 2 {
			http.Error(w, "out of order", http.StatusInternalServerError)
			return
		}
		fmt.Fprintf(w, `[{"workload": "web-%d"}]`, n)
	})
	cmd := exec.Command(build(t), "workloads", "--watch=100ms", "--run-dir", dir)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	deadline := time.AfterFunc(60*time.Second, func() { cmd.Process.Kill() })
	defer deadline.Stop()
	var said strings.Builder
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		fmt.Fprintln(&said, lines.Text())
		if strings.Contains(lines.Text(), "web-4") {
			cmd.Process.Signal(os.Interrupt)
			break
		}
	}
	io.Copy(io.Discard, stdout)
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGINT: %v", err)
	}
	got := said.String()
	if strings.Contains(got, "\x1b") || !strings.Contains(got, "web-1") || !strings.Contains(got, "\n\nWORKLOAD") || strings.Count(got, "WORKLOAD") != 3 {
		t.Errorf("it has shown\n%s", got)
	}
	if !strings.Contains(stderr.String(), "out of order") {
		t.Errorf("and of what failed:\n%s", &stderr)
	}
}

// terminal is a new terminal of some rows: what is written to the second comes out of
// the first.
func terminal(t *testing.T, rows uint16) (reads, writes *os.File) {
	t.Helper()
	reads, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reads.Close() })
	fd := int(reads.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: 200}); err != nil {
		t.Fatal(err)
	}
	writes, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return reads, writes
}

// TestWatchOnATerminal: an answer takes the place of the one before, and is cut at
// the terminal's height.
func TestWatchOnATerminal(t *testing.T) {
	var asked atomic.Int64
	dir := answering(t, "/workloads", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `[{"workload": "first-%d"}, {"workload": "b"}, {"workload": "c"}, {"workload": "last"}]`, asked.Add(1))
	})
	reads, writes := terminal(t, 4)
	cmd := exec.Command(build(t), "workloads", "--watch=100ms", "--run-dir", dir)
	cmd.Stdout, cmd.Stderr = writes, writes
	err := cmd.Start()
	writes.Close()
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.AfterFunc(60*time.Second, func() { cmd.Process.Kill() })
	defer deadline.Stop()
	var got strings.Builder
	for buf := make([]byte, 4096); ; {
		n, err := reads.Read(buf) // EIO at its end
		got.Write(buf[:n])
		if err != nil {
			break
		}
		if strings.Contains(got.String(), "first-3") {
			cmd.Process.Signal(os.Interrupt)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGINT: %v", err)
	}
	text := got.String()
	if strings.Count(text, "\x1b[H\x1b[J") < 3 || !strings.Contains(text, "… and 3 lines more") || strings.Contains(text, "last") {
		t.Errorf("it has shown %q", text)
	}
}
