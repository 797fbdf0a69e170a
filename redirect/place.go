// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/input"
	"github.com/culvert-mesh/culvert/internal/netns"
)

const (
	defaultBPFFS = "/sys/fs/bpf"
	lockFile     = "lock"
	podsDir      = "pods"
)

// takeLock makes this process the run directory's only one. The lock goes with
// the process, however that ends.
func takeLock(runDir string) (*os.File, error) {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	path := filepath.Join(runDir, lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock run directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder, _ := os.ReadFile(path)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another ztunnel runs with the run directory %s, process %s: stop it first, or give this one another runDir", runDir, strings.TrimSpace(string(holder)))
		}
		return nil, fmt.Errorf("lock run directory: %w", err)
	}
	// Cleanup removes the file: what was locked may not be what is there now.
	if now, err := os.Stat(path); err != nil || !sameFile(f, now) {
		f.Close()
		return nil, fmt.Errorf("lock run directory %s: `ztunnel cleanup` was at work in it: try again", runDir)
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("write lock of run directory: %w", err)
	}
	return f, nil
}

// CheckFree fails where an instance runs with the run directory, and names it.
func CheckFree(runDir string) error {
	if _, err := os.Stat(filepath.Join(runDir, lockFile)); err != nil {
		return nil
	}
	lock, err := takeLock(runDir)
	if err != nil {
		return err
	}
	return lock.Close()
}

func sameFile(f *os.File, info os.FileInfo) bool {
	have, err := f.Stat()
	return err == nil && os.SameFile(have, info)
}

// ownBPFFS is mounted below the run directory where the usual place cannot be.
const ownBPFFS = "bpf"

// mountedBPFFS returns where bpffs is mounted, of the places that pins may be in:
// the first is that of new ones.
func mountedBPFFS(cfg Config) []string {
	return slices.DeleteFunc([]string{cfg.BPFFS, filepath.Join(cfg.RunDir, ownBPFFS)}, func(path string) bool { return !isBPFFS(path) })
}

// instanceDirs returns where this instance's pins may be, of whatever layout.
func instanceDirs(cfg Config) []string {
	var out []string
	for _, root := range mountedBPFFS(cfg) {
		out = append(out, filepath.Join(root, "culvert", instance(cfg.RunDir)))
	}
	return out
}

// PinsAreOutOfSight reports whether an instance has run with a run directory, and
// there is no bpffs here in which its pins would be.
func PinsAreOutOfSight(runDir string) bool {
	_, err := os.Stat(filepath.Join(runDir, lockFile))
	return err == nil && len(instanceDirs(Config{RunDir: runDir, BPFFS: defaultBPFFS})) == 0
}

// pinDirs returns where this instance's pins are.
func pinDirs(cfg Config) []string {
	var out []string
	for _, dir := range instanceDirs(cfg) {
		dir = filepath.Join(dir, layout)
		if _, err := os.Stat(dir); err == nil {
			out = append(out, dir)
		}
	}
	return out
}

func isBPFFS(path string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs) == nil && fs.Type == unix.BPF_FS_MAGIC
}

// makePinDir makes the directory of this instance's pins, where they are
// already, or else in bpffs, which it mounts when it has to.
func makePinDir(cfg Config) (string, error) {
	root, err := mountBPFFS(cfg)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, "culvert", instance(cfg.RunDir), layout)
	if found := pinDirs(cfg); len(found) > 0 {
		dir = found[0]
	}
	if err := otherLayouts(filepath.Dir(dir)); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Join(dir, podsDir), 0o700); err != nil {
		return "", fmt.Errorf("make pin directory: %w", err)
	}
	return dir, pinRunDir(dir, cfg.RunDir)
}

// otherLayouts refuses pins of another layout: what they attach would go on
// beside ours.
func otherLayouts(dir string) error {
	all, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look for pins: %w", err)
	}
	for _, o := range all {
		if o.Name() != layout {
			return fmt.Errorf("%s holds pins of another version of Culvert (layout %s, this one has %s): run that version's `ztunnel cleanup`", dir, o.Name(), layout)
		}
	}
	return nil
}

func mountAt(path string) error {
	return unix.Mount("bpf", path, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700")
}

// ProbeBPFFS says where the pins are to be, and whether bpffs is mounted there.
// Where it is not, it is mounted in a folder below in and taken away again: an
// error says that it cannot be.
func ProbeBPFFS(cfg Config, in string) (path string, mounted bool, err error) {
	if err := cfg.setDefaults(); err != nil {
		return "", false, err
	}
	if found := mountedBPFFS(cfg); len(found) > 0 {
		return found[0], true, nil
	}
	at, err := os.MkdirTemp(in, ".culvert-bpffs-")
	if err != nil {
		return "", false, fmt.Errorf("try to mount bpffs: %w", err)
	}
	defer os.Remove(at)
	if err := mountAt(at); err != nil {
		return "", false, fmt.Errorf("mount bpffs: %w", err)
	}
	if err := unix.Unmount(at, 0); err != nil {
		return "", false, fmt.Errorf("unmount bpffs from %s: %w", at, err)
	}
	if info, err := os.Stat(cfg.BPFFS); err == nil && info.IsDir() {
		return cfg.BPFFS, false, nil
	}
	return filepath.Join(cfg.RunDir, ownBPFFS), false, nil
}

func mountBPFFS(cfg Config) (string, error) {
	if found := mountedBPFFS(cfg); len(found) > 0 {
		return found[0], nil
	}
	// Two daemons that start at once would mount one over the other, and the
	// first one's pins would be out of sight. The lock is the mount point's.
	unlock, err := lockDir(cfg.BPFFS)
	if err == nil {
		defer unlock()
		if isBPFFS(cfg.BPFFS) {
			return cfg.BPFFS, nil
		}
		err = mountAt(cfg.BPFFS)
	}
	if err == nil {
		cfg.Logger.Info("mounted bpffs, it stays", "path", cfg.BPFFS)
		return cfg.BPFFS, nil
	}
	own := filepath.Join(cfg.RunDir, ownBPFFS)
	if merr := os.MkdirAll(own, 0o700); merr != nil {
		return "", fmt.Errorf("make bpffs mount point: %w", merr)
	}
	if merr := mountAt(own); merr != nil {
		return "", fmt.Errorf("mount bpffs at %s: %w (nor at %s: %w)", own, merr, cfg.BPFFS, err)
	}
	cfg.Logger.Info("mounted bpffs", "path", own)
	return own, nil
}

// lockDir waits for the lock of a directory, as it is now.
func lockDir(path string) (unlock func(), err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// cgroupRoot finds where cgroup v2 is mounted: beside v1 it may be under
// /sys/fs/cgroup/unified.
func cgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup v2: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		// 36 35 98:0 /root /mount/point options … - type source options
		before, after, ok := strings.Cut(s.Text(), " - ")
		if fields := strings.Fields(before); ok && strings.HasPrefix(after, "cgroup2 ") && len(fields) >= 5 && fields[3] == "/" {
			return fields[4], nil
		}
	}
	return "", errors.New("find cgroup v2: it is not mounted here")
}

// FindCgroup returns the directory of Config.Cgroup, and its path within the
// hierarchy ("/" for the root). Its error is an *input.Error where it is the cgroup
// that is wrong.
func FindCgroup(cgroup string) (dir, path string, err error) {
	root, err := cgroupRoot()
	if err != nil {
		return "", "", err
	}
	if cgroup == "" {
		return root, "/", nil
	}
	dir = filepath.Clean(cgroup)
	if dir != root && !strings.HasPrefix(dir, root+"/") {
		inside := filepath.Join(root, cgroup) // as /proc/PID/cgroup has it
		if _, err := os.Stat(inside); err == nil {
			dir = inside
		}
	}
	if err := checkCgroup(dir, root); err != nil {
		return "", "", err
	}
	rel, err := filepath.Rel(root, dir)
	if err != nil {
		return "", "", fmt.Errorf("find cgroup %s: %w", dir, err)
	}
	return dir, filepath.Join("/", rel), nil
}

// CheckCgroup says whether hooks can be attached to Config.Cgroup, as far as that
// can be said without doing it. Its error is an *input.Error where it is the cgroup
// that is wrong.
func CheckCgroup(cgroup string) error {
	if cgroup == "" {
		return nil // the root, wherever it is: Open tells if it is nowhere
	}
	_, _, err := FindCgroup(cgroup)
	return err
}

func checkCgroup(dir, root string) error {
	mend := "set cgroup to one, such as " + filepath.Join(root, "kubepods") + `, or to "" for the root`
	var fs unix.Statfs_t
	info, err := os.Stat(dir)
	if err == nil {
		err = unix.Statfs(dir, &fs)
	}
	switch below := dir == root || strings.HasPrefix(dir, root+"/"); {
	case errors.Is(err, unix.ENOENT):
		return input.Wrong(dir, mend, "no such cgroup")
	case err != nil:
		return input.Unusable(dir, err)
	case fs.Type == unix.CGROUP_SUPER_MAGIC:
		return input.Wrong(dir, mend, "is of cgroup v1; those of v2 are below %s", root)
	case fs.Type != unix.CGROUP2_SUPER_MAGIC || !below:
		return input.Wrong(dir, mend, "is no cgroup; those of v2 are below %s", root)
	case !info.IsDir():
		return input.Wrong(dir, mend, "is a file of a cgroup, not the cgroup")
	}
	return nil
}

// SeesAll says whether a cgroup is one that every process of the machine lives
// below: the root, where the process itself is in no cgroup namespace.
func SeesAll(cgroup string) bool {
	return cgroup == "/" && InitialNamespace("cgroup")
}

// InitialNamespace says whether the process is in the machine's own namespace of a
// kind, cgroup or pid. Their numbers are fixed (linux/proc_ns.h, since 3.8).
func InitialNamespace(kind string) bool {
	initial := map[string]uint64{"cgroup": 0xEFFFFFFB, "pid": 0xEFFFFFFC}[kind]
	var st unix.Stat_t
	return unix.Stat("/proc/self/ns/"+kind, &st) == nil && st.Ino == initial
}

// Outsiders returns the processes of a network namespace that do not live below
// a cgroup: the hooks do not see them. This process is none of them, though its
// first thread may be in the namespace at the moment: its sockets are known.
func Outsiders(cgroup string, ns *netns.NS) ([]string, error) {
	if SeesAll(cgroup) {
		return nil, nil
	}
	ino, err := inode(ns)
	if err != nil {
		return nil, err
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	self := fmt.Sprintf("/proc/%d", os.Getpid())
	var out []string
	for _, p := range procs {
		var in unix.Stat_t
		if p == self || unix.Stat(filepath.Join(p, "ns/net"), &in) != nil || in.Ino != ino {
			continue // gone, or a kernel thread; or elsewhere
		}
		data, err := os.ReadFile(filepath.Join(p, "cgroup"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			at, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
			if ok && !isBelow(at, cgroup) {
				comm, _ := os.ReadFile(filepath.Join(p, "comm"))
				out = append(out, fmt.Sprintf("%s (%s) in %s", filepath.Base(p), strings.TrimSpace(string(comm)), at))
			}
		}
	}
	return out, nil
}

// isBelow says whether a cgroup is another or below it. What is outside of the
// reader's cgroup namespace has a path that begins with "/.." (cgroup_namespaces(7)).
func isBelow(at, cgroup string) bool {
	if at == "/.." || strings.HasPrefix(at, "/../") {
		return false
	}
	return cgroup == "/" || at == cgroup || strings.HasPrefix(at, cgroup+"/")
}
