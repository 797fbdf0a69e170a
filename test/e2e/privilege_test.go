// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vishvananda/netlink"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/privilege"
)

// startWithout starts cmd in ns, as root without some capabilities. Its thread is
// for nothing else, and ends.
func startWithout(ns *netns.NS, cmd *exec.Cmd, capabilities ...uintptr) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		err := ns.Enter()
		for _, c := range capabilities {
			err = errors.Join(err, unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0))
		}
		done <- errors.Join(err, cmd.Start())
	}()
	return <-done
}

// A daemon that lacks what it needs says so in one line, and is gone before
// anything is attached or made. The control has less than root too, and enrols.
func TestMissingCapability(t *testing.T) {
	e := setup(t)
	n := e.Nodes[0]
	e.must(n.Configure(lab.DaemonConfig{Pods: n.Pods[:1]}))
	start := func(lacking ...uintptr) (*exec.Cmd, *bytes.Buffer) {
		var stderr bytes.Buffer
		cmd := exec.Command(ztunnel, "run", "--config", filepath.Join(n.Dir, "config.yaml"))
		cmd.Stderr = &stderr
		e.must(startWithout(n.NS, cmd, lacking...))
		kill := time.AfterFunc(scaled(10*time.Second), func() { cmd.Process.Kill() })
		t.Cleanup(func() { kill.Stop(); cmd.Process.Kill() })
		return cmd, &stderr
	}
	without := map[string][]uintptr{"CAP_NET_ADMIN and CAP_SYS_ADMIN": {unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN}}
	for _, c := range privilege.Needed() {
		without[c.Name] = []uintptr{uintptr(c.Number)}
	}
	for name, lacking := range without {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			cmd, stderr := start(lacking...)
			err := cmd.Wait()
			lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
			said := lines[len(lines)-1]
			if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(said, "the process lacks") || !strings.Contains(said, "as root") {
				t.Errorf("%v, and it says\n%s", err, stderr)
			}
			for _, c := range strings.Split(name, " and ") {
				if !strings.Contains(said, c) {
					t.Errorf("%s is not named: %s", c, said)
				}
			}
			if rules, err := podRules(e.Pod(1, 1)); err != nil || rules > 0 {
				t.Errorf("the pod has %d rules, %v", rules, err)
			}
			if exists(n.RunDir()) {
				t.Errorf("%s was made", n.RunDir())
			}
		})
	}
	t.Cleanup(func() {
		if out, err := exec.Command(ztunnel, "cleanup", "--run-dir", n.RunDir()).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	control, said := start(unix.CAP_SYS_RESOURCE, unix.CAP_SYS_MODULE, unix.CAP_NET_BIND_SERVICE)
	err := lab.Until(e.ctx, "the control has set up the pod", func() error {
		if rules, err := podRules(e.Pod(1, 1)); err != nil || rules == 0 {
			return fmt.Errorf("the pod has %d rules, %v", rules, err)
		}
		return nil
	})
	e.must(control.Process.Kill())
	_ = control.Wait()
	if err != nil {
		t.Errorf("%v; it says\n%s", err, said)
	}
}

// podRules counts the rules for our mark in a pod.
func podRules(p *lab.Pod) (n int, err error) {
	err = p.Do(func() error {
		rules, err := netlink.RuleListFiltered(netlink.FAMILY_ALL, &netlink.Rule{Mark: 0x53a}, netlink.RT_FILTER_MARK)
		n = len(rules)
		return err
	})
	return n, err
}

// may returns what the kernel says that each thread of a process may do: the lines of
// its status that begin with one of names, as "name value".
func may(t *testing.T, pid int, names ...string) map[string]int {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(paths) == 0 {
		t.Fatalf("process %d has %d threads, %v", pid, len(paths), err)
	}
	out := map[string]int{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		var has []string
		for line := range strings.Lines(string(data)) {
			if name, value, _ := strings.Cut(line, ":"); slices.Contains(names, name) {
				has = append(has, name+" "+strings.TrimSpace(value))
			}
		}
		out[strings.Join(has, ", ")]++
	}
	return out
}

// Each thread of a daemon that carries connections has the needed capabilities and
// no others, can gain none, and is confined to the system calls that it needs; the
// configuration can leave out the last.
func TestReducedPrivileges(t *testing.T) {
	e := setup(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	var daemons []*lab.Daemon
	for i, seccomp := range []string{"enforce", "disabled"} {
		daemons = append(daemons, e.startOn(e.Nodes[i], lab.DaemonConfig{Settings: map[string]any{"seccomp": seccomp}}))
	}
	held := e.connect(e.Pod(1, 1), app.Addr(4))
	e.must(exchange(held, marker))

	var needed uint64
	var names []string
	for _, c := range privilege.Needed() {
		needed |= 1 << c.Number
		names = append(names, c.Name)
	}
	has := fmt.Sprintf("CapInh %016x, CapPrm %016x, CapEff %016[2]x, CapBnd %016[2]x, CapAmb %016[1]x, NoNewPrivs 1", 0, needed)
	about := []string{"Name", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"}
	name := filepath.Base(ztunnel)
	for i, seccomp := range []string{"2", "0"} {
		want := "Name " + name[:min(len(name), 15)] + ", " + has + ", Seccomp " + seccomp
		if got := may(t, daemons[i].PID(), about...); len(got) != 1 || got[want] < 4 {
			t.Errorf("node %d: threads by what they may do: %v, want all: %s", i+1, got, want)
		}
	}
	for own := range may(t, os.Getpid(), about...) {
		if strings.Contains(own, "CapPrm "+fmt.Sprintf("%016x", needed)) || strings.Contains(own, "NoNewPrivs 1") {
			t.Errorf("control: who started it has no more than that: %s", own)
		}
	}
	for i, seccomp := range []string{"enforce", "disabled"} {
		for _, want := range []string{`"capabilities": "` + strings.Join(names, ", ") + `"`, `"seccomp": "` + seccomp + `"`} {
			if s := e.status(daemons[i]); !strings.Contains(s, want) {
				t.Errorf("node %d: the status does not say %s:\n%s", i+1, want, s)
			}
		}
	}
}

// A process of the same user, root, that lacks CAP_SYS_PTRACE reads nothing of a
// daemon's memory. The controls: one that has it, and the memory of a process that
// has no privileges.
func TestMemoryIsPrivate(t *testing.T) {
	e, d := mesh(t)
	plain, err := e.Nodes[0].Start(exec.Command("sleep", "600"))
	e.must(err)
	read := func(pid int, lacking ...uintptr) string {
		var out bytes.Buffer
		cmd := exec.CommandContext(e.ctx, "sh", "-c", fmt.Sprintf("exec 3< /proc/%d/mem", pid))
		cmd.Stdout, cmd.Stderr = &out, &out
		e.must(startWithout(e.Nodes[0].NS, cmd, lacking...))
		if err := cmd.Wait(); err != nil {
			return out.String()
		}
		return ""
	}
	if said := read(d[0].PID(), unix.CAP_SYS_PTRACE); !strings.Contains(said, "Permission denied") {
		t.Errorf("a process without CAP_SYS_PTRACE opens it: %q", said)
	}
	if said := read(d[0].PID()); said != "" {
		t.Errorf("control: with it: %s", said)
	}
	if said := read(plain.PID()); said != "" {
		t.Errorf("control: that of a process without privileges: %s", said)
	}
}

// What a daemon makes is its own: files and sockets of mode 0600, folders of 0700,
// whatever the mask that it was started with.
func TestFilesArePrivate(t *testing.T) {
	before := unix.Umask(0)
	defer unix.Umask(before)
	loose := filepath.Join(t.TempDir(), "loose")
	if err := os.WriteFile(loose, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(loose); err != nil || info.Mode().Perm() != 0o666 {
		t.Fatalf("control: a file made with this mask: %v, %v", info.Mode(), err)
	}
	e, d := mesh(t)
	seen := 0
	for _, dir := range []string{d[0].RunDir(), e.pins(d[0])} {
		err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := entry.Info()
			if err != nil {
				return err
			}
			want := os.FileMode(0o600)
			switch {
			case info.Mode()&os.ModeSymlink != 0:
				return nil
			case info.IsDir():
				want = 0o700
			}
			seen++
			if info.Mode().Perm() != want {
				t.Errorf("%s: %s, want %s", path, info.Mode(), want)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if seen < 15 {
		t.Errorf("only %d files were found", seen)
	}
}
