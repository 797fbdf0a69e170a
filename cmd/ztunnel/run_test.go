// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// podless makes the files of a daemon with no pods, in a folder of its own, and the
// binary. What the daemon leaves is cleaned up.
func podless(t *testing.T, metrics string) (bin, dir, conf string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	dir = files(t, map[string]string{
		"config.yaml":    fmt.Sprintf("runDir: run\nidentity: {ca: {dir: ca}}\nmetrics: {address: %q}\n", metrics),
		"workloads.yaml": "", "pods.yaml": "",
	})
	conf = filepath.Join(dir, "config.yaml")
	t.Cleanup(func() { call(t, "cleanup", "--config", conf) })
	return build(t), dir, conf
}

// start runs the binary, waits until it says that it is ready, and returns what it
// has said until then.
func start(t *testing.T, bin, conf string, env ...string) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command(bin, "run", "--config", conf)
	cmd.Env = append(os.Environ(), env...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	deadline := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	defer deadline.Stop()
	var said strings.Builder
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		fmt.Fprintln(&said, lines.Text())
		if strings.Contains(lines.Text(), `"msg":"ready"`) {
			go io.Copy(io.Discard, stderr) // nothing that it says later waits for a reader
			return cmd, said.String()
		}
	}
	t.Fatalf("it has not become ready:\n%s", &said)
	return nil, ""
}

// wait ends with the process, which is killed when it takes too long.
func wait(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	deadline := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	defer deadline.Stop()
	cmd.Wait()
	return cmd.ProcessState.ExitCode()
}

// TestRunAndCleanup needs root: it attaches the hooks, with a run folder of its
// own and no pod, so that nothing is captured.
func TestRunAndCleanup(t *testing.T) {
	bin, dir, conf := podless(t, "127.0.0.1:0")
	cmd, said := start(t, bin, conf)
	for _, want := range []string{`"msg":"starting"`, conf, filepath.Join(dir, "run"), filepath.Join(dir, "pods.yaml"), "/culvert/", "net:["} {
		if !strings.Contains(said, want) {
			t.Errorf("its first words do not name %s:\n%s", want, said)
		}
	}
	pid := fmt.Sprint(cmd.Process.Pid)
	for _, args := range [][]string{{"run", "--config", conf}, {"cleanup", "--config", conf}} {
		out, _ := exec.Command(bin, args...).CombinedOutput()
		if !strings.Contains(string(out), pid) {
			t.Errorf("%s beside a daemon does not name process %s:\n%s", args[0], pid, out)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := wait(t, cmd); code != exitOK {
		t.Errorf("SIGTERM: exit code %d", code)
	}

	cmd, _ = start(t, bin, conf) // takes over what is pinned
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	wait(t, cmd)

	code, stdout, stderr := call(t, "cleanup", "--config", conf)
	if code != exitOK || !strings.Contains(stdout, "connect4") {
		t.Errorf("cleanup: exit code %d\n%s%s", code, stdout, stderr)
	}
	code, stdout, stderr = call(t, "cleanup", "--config", conf)
	if code != exitOK || !strings.Contains(stdout, "nothing to clean up") {
		t.Errorf("a second cleanup: exit code %d\n%s%s", code, stdout, stderr)
	}
}

// TestCrash: it is no exit code, of which 2 would keep the unit from starting it again
// (RestartPreventExitStatus=). SIGQUIT goes the way of a panic that nobody recovers
// from. Needs root.
func TestCrash(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	dir := files(t, map[string]string{
		"config.yaml":    "runDir: run\nidentity: {ca: {dir: ca}}\nmetrics: {address: \"127.0.0.1:0\"}\n",
		"workloads.yaml": "", "pods.yaml": "",
	})
	conf := filepath.Join(dir, "config.yaml")
	bin := build(t)
	t.Cleanup(func() { call(t, "cleanup", "--config", conf) })
	cmd, _ := start(t, bin, conf)
	if err := cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	wait(t, cmd)
	if how := cmd.ProcessState.Sys().(syscall.WaitStatus); how.Signal() != syscall.SIGABRT || how.CoreDump() {
		t.Errorf("it ended with %v, want SIGABRT and no core", cmd.ProcessState)
	}
}

// TestNotify: a service manager hears of the readiness, at a socket in the file
// system or an abstract one. Needs root.
func TestNotify(t *testing.T) {
	bin, dir, conf := podless(t, "127.0.0.1:0")
	for _, name := range []string{filepath.Join(dir, "notify"), fmt.Sprintf("@culvert-test-%d", os.Getpid())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		l.SetReadDeadline(time.Now().Add(30 * time.Second))
		cmd, _ := start(t, bin, conf, "NOTIFY_SOCKET="+name)
		got := make([]byte, 100)
		n, err := l.Read(got)
		if string(got[:n]) != "READY=1" {
			t.Errorf("%s: heard %q, %v", name, got[:n], err)
		}
		cmd.Process.Signal(syscall.SIGTERM)
		wait(t, cmd)
	}
	// Nobody at it is no reason not to start.
	cmd, _ := start(t, bin, conf, "NOTIFY_SOCKET="+filepath.Join(dir, "nobody"))
	cmd.Process.Signal(syscall.SIGTERM)
	if code := wait(t, cmd); code != exitOK {
		t.Errorf("with nobody to tell: exit code %d", code)
	}
}

// TestMetricsAddressIsTaken: such a start leaves nothing behind, and names the
// other daemon where it is one with the same files. Needs root.
func TestMetricsAddressIsTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	bin, dir, conf := podless(t, l.Addr().String())
	run := filepath.Join(dir, "run")
	out, err := exec.CommandContext(t.Context(), bin, "run", "--config", conf).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "set metrics.address") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := os.Stat(run); !os.IsNotExist(err) {
		t.Errorf("a run folder was made: %v", err)
	}

	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(filepath.Join(run, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	fmt.Fprintln(lock, 4711)
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	if out, _ := exec.CommandContext(t.Context(), bin, "run", "--config", conf).CombinedOutput(); !strings.Contains(string(out), "process 4711") {
		t.Errorf("another daemon is not named:\n%s", out)
	}
}
