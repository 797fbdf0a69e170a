// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/internal/testns"
	"github.com/culvert-mesh/culvert/redirect"
)

// A need is taken away from a process of the tests' own: this binary, started
// again, which makes the checks and prints what it has found. On the thread that
// starts it, and that dies then, mounts, namespaces, capabilities and system calls
// can be taken away as from a container.

const (
	childEnv  = "PREFLIGHT_CHILD"  // the path of a configuration
	startEnv  = "PREFLIGHT_START"  // as at a daemon's start
	filesEnv  = "PREFLIGHT_FILES"  // the limit of open files
	lockedEnv = "PREFLIGHT_LOCKED" // the limit of locked memory, in bytes
	innerEnv  = "PREFLIGHT_INNER"  // cgroup v2 as a container has it: its own cgroup is the root
)

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		if err := child(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(path string) error {
	if os.Getenv(innerEnv) != "" {
		return onThread(inner)
	}
	for name, resource := range map[string]int{filesEnv: unix.RLIMIT_NOFILE, lockedEnv: unix.RLIMIT_MEMLOCK} {
		text := os.Getenv(name)
		if text == "" {
			continue
		}
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return err
		}
		if err := syscall.Setrlimit(resource, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
			return err
		}
	}
	cfg, err := config.Load(path)
	if err != nil {
		cfg = config.Default(filepath.Dir(path))
	}
	if os.Getenv(startEnv) != "" {
		return Start(context.Background(), cfg, slog.New(slog.NewTextHandler(os.Stdout, nil)))
	}
	return json.NewEncoder(os.Stdout).Encode(Run(context.Background(), Machine{Config: cfg, ConfigErr: err}))
}

// inner goes on in a cgroup namespace of its own, with cgroup v2 mounted anew.
func inner() error {
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return err
	}
	root, err := testns.CgroupRoot()
	if err == nil {
		err = all(unmounted("cgroup2"), func() error { return unix.Mount("none", root, "cgroup2", 0, "") })()
	}
	if err != nil {
		return err
	}
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, innerEnv+"=") })
	return unix.Exec("/proc/self/exe", os.Args, env)
}

// node is a configuration to look at, with nothing in it.
type node struct {
	t   *testing.T
	dir string
}

func newNode(t *testing.T, more ...string) node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test takes needs away from processes: run it as root")
	}
	n := node{t, t.TempDir()}
	n.write("config.yaml", "runDir: run\nidentity: {ca: {dir: ca}}\nmetrics: {address: 127.0.0.1:0}\n"+strings.Join(more, "\n"))
	n.write("workloads.yaml", "workloads: []\n")
	n.write("pods.yaml", "pods: []\n")
	return n
}

func (n node) write(name, text string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, name), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// command is a process that makes the checks.
func (n node) command(env ...string) *exec.Cmd {
	cmd := exec.CommandContext(n.t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), append(env, childEnv+"="+filepath.Join(n.dir, "config.yaml"))...)
	return cmd
}

// output runs cmd, from a thread that without has taken something away from.
func output(t *testing.T, cmd *exec.Cmd, without func() error) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if e := onThread(func() error { return errors.Join(without(), cmd.Start()) }); e != nil {
		t.Fatal(e)
	}
	err = cmd.Wait()
	return out.String(), errs.String(), err
}

// onThread runs f on a thread of its own, which dies then.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		if unix.Gettid() == unix.Getpid() {
			// The first thread does not die. Hold it, so that another does the work.
			defer runtime.UnlockOSThread()
			done <- onThread(f)
			return
		}
		done <- f()
	}()
	return <-done
}

// look makes the checks in a process without something.
func (n node) look(cmd *exec.Cmd, without func() error) []Finding {
	n.t.Helper()
	stdout, stderr, err := output(n.t, cmd, without)
	if err != nil {
		n.t.Fatalf("%v\n%s", err, stderr)
	}
	var found []Finding
	if err := json.Unmarshal([]byte(stdout), &found); err != nil {
		n.t.Fatalf("%v\n%s%s", err, stdout, stderr)
	}
	return found
}

func of(found []Finding, check string) []Finding {
	return slices.DeleteFunc(slices.Clone(found), func(f Finding) bool { return f.Check != check })
}

// wants holds what was found of a check against a state, and parts of detail and
// mend.
func wants(t *testing.T, found []Finding, check string, s State, detail, mend string) {
	t.Helper()
	for _, f := range of(found, check) {
		if f.State == s && strings.Contains(f.Detail, detail) && strings.Contains(f.Mend, mend) && (s == OK || s == Skipped || f.Mend != "") {
			return
		}
	}
	t.Errorf("no %s of %q with %q and the mend %q in\n%+v", s, check, detail, mend, of(found, check))
}

func nothing() error { return nil }

// all does one after the other.
func all(f ...func() error) func() error {
	return func() error {
		for _, f := range f {
			if err := f(); err != nil {
				return err
			}
		}
		return nil
	}
}

// ownMounts is a mount namespace whose changes are seen by nobody else.
func ownMounts() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
}

// unmounted is what it says, of whatever is mounted of a type.
func unmounted(kind string) func() error {
	return all(ownMounts, func() error {
		data, err := os.ReadFile("/proc/thread-self/mounts")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); f[2] == kind {
				if err := unix.Unmount(f[1], unix.MNT_DETACH); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// readOnly makes what is below path so.
func readOnly(path string) func() error {
	return all(ownMounts, func() error {
		if err := unix.Mount(path, path, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
		return unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	})
}

// onlyWritable is a container of which one folder, below /tmp, can be written, and
// where bpffs is not mounted yet.
func onlyWritable(dir string) func() error {
	const readOnly = unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY
	return all(unmounted("bpf"), func() error {
		for _, m := range []struct {
			at    string
			flags uintptr
		}{{"/tmp", unix.MS_BIND}, {"/tmp", readOnly}, {dir, unix.MS_BIND}, {dir, unix.MS_BIND | unix.MS_REMOUNT}, {"/", readOnly}} {
			if err := unix.Mount(m.at, m.at, "", m.flags, ""); err != nil {
				return err
			}
		}
		return nil
	})
}

// fakeSysctls puts files in the place of /proc/sys: its own folders are another's in
// each network namespace, and cannot be covered.
func fakeSysctls(files map[string]string) func() error {
	return all(ownMounts, func() error {
		if err := unix.Mount("none", "/proc/sys", "tmpfs", 0, ""); err != nil {
			return err
		}
		for key, value := range files {
			path := filepath.Join("/proc/sys", key)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
			if err := write(path, value); err != nil {
				return err
			}
		}
		return nil
	})
}

// sysctlsWithout is a kernel that lacks one of ours.
func sysctlsWithout(key string) func() error {
	files := map[string]string{}
	for _, s := range redirect.Sysctls(true) {
		if s.Key != key {
			files[s.Key] = "0"
		}
	}
	return fakeSysctls(files)
}

func without(capabilities ...uintptr) func() error {
	return func() error {
		for _, c := range capabilities {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
				return err
			}
		}
		return nil
	}
}

// denied has the kernel answer a system call with an error, of a process that is
// started from this thread: as a container's seccomp profile does. arg, where it is
// not negative, must be value.
func denied(call uint32, errno unix.Errno, arg int, value uint32) func() error {
	return func() error {
		const (
			nr   = 0  // offsetof(struct seccomp_data, nr)
			args = 16 // and of its arguments, 8 bytes each
		)
		load := func(at uint32) unix.SockFilter {
			return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
		}
		filter := []unix.SockFilter{load(nr), {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: call, Jf: 1}}
		if arg >= 0 {
			filter[1].Jf = 3
			filter = append(filter, load(uint32(args+8*arg)), unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jf: 1})
		}
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
		prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0)
		runtime.KeepAlive(filter)
		return err
	}
}

// left is what the checks have left behind, of whatever process, and below where
// its run folder is.
func left(t *testing.T, dir string) []string {
	t.Helper()
	out, err := filepath.Glob(filepath.Join(dir, ".culvert-*"))
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if strings.Contains(f[1], "culvert-check-") || strings.Contains(f[1], "culvert-bpffs-") {
			out = append(out, "mount "+f[1])
		}
		if f[2] == "cgroup2" {
			cgroups, err := filepath.Glob(f[1] + "/culvert-check-*")
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, cgroups...)
		}
	}
	return out
}

func write(path, text string) error { return os.WriteFile(path, []byte(text), 0o644) }
