// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/privilege"
	"github.com/vishvananda/netlink"
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
