// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/internal/testns"
	"github.com/culvert-mesh/culvert/privilege"
	"github.com/culvert-mesh/culvert/redirect"
)

// asDaemon has this program be a daemon, with the configuration that it names and
// the privileges that it was started with.
const asDaemon = "CULVERT_TEST_DAEMON"

// The first thread stays out of namespaces: a daemon takes the process for one that
// lives where its first thread is.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	path := os.Getenv(asDaemon)
	if path == "" {
		os.Exit(m.Run())
	}
	cfg, err := config.Load(path)
	if err == nil {
		err = Run(context.Background(), cfg, Options{
			Logger: slog.New(slog.NewJSONHandler(os.Stdout, nil)), Level: &slog.LevelVar{}, Lines: &Lines{}, AccessLog: os.Stderr,
		})
	}
	_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"msg": "ended", "err": fmt.Sprint(err)})
	os.Exit(1)
}

// Without any one of the capabilities that privilege lists the daemon does not enrol
// a pod. The control has exactly those.
func TestEachCapabilityIsNeeded(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test starts daemons: run it as root")
	}
	pod := testns.New(t)
	if err := pod.Do(addEth0); err != nil {
		t.Fatal(err)
	}
	cgroup := testns.Cgroup(t, "daemon")
	// Somebody else's process in the pod, which has to be found to live in the cgroup.
	app := exec.CommandContext(t.Context(), "sleep", "600")
	app.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	start(t, cgroup, app, func() error { return pod.Do(app.Start) })
	path := filepath.Join("/proc", fmt.Sprint(app.Process.Pid), "ns/net")

	for _, without := range append([]privilege.Capability{{}}, privilege.Needed()...) {
		t.Run(cmp.Or(without.Name, "control"), func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{
				"config.yaml":    fmt.Sprintf("runDir: run\ncgroup: %s\nidentity: {ca: {dir: ca}}\nmetrics: {address: \"127.0.0.1:0\"}\n", cgroup),
				"workloads.yaml": "workloads: [{name: app, addresses: [10.99.7.1]}]\n",
				"pods.yaml":      fmt.Sprintf("pods: [{name: app, netns: %s, addresses: [10.99.7.1]}]\n", path),
			} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			t.Cleanup(func() {
				if _, err := redirect.Cleanup(redirect.Config{RunDir: filepath.Join(dir, "run"), Cgroup: cgroup, Logger: slog.New(slog.DiscardHandler)}); err != nil {
					t.Error(err)
				}
			})
			var drop []uint
			for n := range uint(unix.CAP_LAST_CAP + 1) {
				if n == without.Number && without.Name != "" || !isNeeded(n) {
					drop = append(drop, n)
				}
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0])
			cmd.Env = append(os.Environ(), asDaemon+"="+filepath.Join(dir, "config.yaml"))
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			start(t, cgroup, cmd, func() error {
				var err error
				for _, n := range drop {
					err = errors.Join(err, unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0))
				}
				return errors.Join(err, cmd.Start())
			})
			failure := untilReady(t, cmd, bufio.NewScanner(stdout))
			t.Logf("what it says: %q", failure)
			if (failure == "") != (without.Name == "") {
				t.Errorf("the pod is enrolled: %v", failure == "")
			}
		})
	}
}

func isNeeded(number uint) bool {
	return slices.ContainsFunc(privilege.Needed(), func(c privilege.Capability) bool { return c.Number == number })
}

// untilReady reads the daemon's log until it has tried its pods, or has ended. It
// returns why the pod is not enrolled.
func untilReady(t *testing.T, cmd *exec.Cmd, lines *bufio.Scanner) (failure string) {
	t.Helper()
	late := time.AfterFunc(60*time.Second, func() { cmd.Process.Kill() })
	defer late.Stop()
	for lines.Scan() {
		var line struct{ Msg, Err string }
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
		switch line.Msg {
		case "pod is not enrolled":
			failure = line.Err
		case "ended":
			return line.Err
		case "ready":
			return failure
		}
	}
	t.Fatal("it said nothing of its pods for a minute, or ended without a word")
	return ""
}

// start has f start cmd, in a cgroup, on a thread that ends with it. It is killed when
// the test ends.
func start(t *testing.T, cgroup string, cmd *exec.Cmd, f func() error) {
	t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		done <- f()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); _ = cmd.Wait() })
}

// addEth0 gives the namespace an interface with the pod's address.
func addEth0() error {
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth1"}); err != nil {
		return err
	}
	for _, name := range []string{"eth0", "eth1"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		if name == "eth0" {
			err = netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 99, 7, 1), Mask: net.CIDRMask(24, 32)}})
		}
		if err != nil {
			return err
		}
	}
	return nil
}
