// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/admin"
)

// answering serves an admin socket, and returns its run folder.
func answering(t *testing.T, path string, answer http.HandlerFunc) string {
	t.Helper()
	dir := t.TempDir()
	s, err := admin.Listen(t.Context(), filepath.Join(dir, "admin.sock"), admin.Mount{Pattern: "GET " + path, Handler: answer})
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
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: filepath.Join(dir, "admin.sock")}); err != nil {
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
	// What holds the test's folders is for its user only.
	if err := os.Chmod(filepath.Dir(filepath.Dir(bin)), 0o755); err != nil {
		t.Fatal(err)
	}
	dir := answering(t, "/status", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") })
	for _, args := range [][]string{{"status"}, {"log-level", "debug"}, {"bugreport", "--out", "-"}} {
		cmd := exec.Command(bin, append(args, "--run-dir", dir)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if want := fmt.Sprintf("needs root, runs as user %d: use sudo", 65534); err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%v: no %q in\n%s", args, want, out)
		}
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
