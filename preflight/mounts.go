// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/redirect"
)

func mountChecks() []Check {
	return []Check{
		{
			Name: "cgroup", run: cgroup, AtStart: true,
			Why:     "the hooks are attached to a cgroup (v2), and see the processes below it",
			Without: "ztunnel does not start; what lives elsewhere would send plaintext, so its pod is not enrolled",
			Mend:    "mount it with `mount -t cgroup2 none /sys/fs/cgroup/unified`, and do not start ztunnel by `ip netns exec`, which hides it (use nsenter --net)",
		},
		{
			Name: "run folder", run: runFolder, AtStart: true,
			Why:     "lock, admin socket, and what a release needs",
			Without: "ztunnel does not start",
			Mend:    "set runDir to a folder on a local file system that can be written, best of memory: below /run",
		},
		{
			Name: "bpffs", run: bpffs, AtStart: true, after: []string{"capabilities", "run folder"},
			Why:     "hooks and maps are pinned there, so that pods are refused while no daemon runs",
			Without: "ztunnel does not start; where it goes with a container, pods are in plaintext from then on",
			Mend:    "mount it on the node with `mount -t bpf bpf /sys/fs/bpf`, and in a container bring it in as a hostPath",
		},
	}
}

func cgroup(l *look) {
	dir, path, err := redirect.FindCgroup(l.Config.Cgroup)
	switch {
	case err != nil:
		l.failed(err)
	case redirect.SeesAll(path):
		l.ok("%s, the root: it holds every process", dir)
	case !redirect.InitialNamespace("pid"):
		l.warn("%s: the process is in a cgroup or pid namespace of its own: which processes live below that cgroup cannot be told, and those of a pod that do not are not captured", dir).
			mend("give the container the node's namespaces: hostPID: true, and privileged, which has the node's cgroups")
	default:
		l.ok("%s; a pod with processes outside of it is not enrolled", dir)
	}
}

func bpffs(l *look) {
	path, mounted, err := redirect.ProbeBPFFS(redirect.Config{RunDir: l.Config.RunDir}, l.writable)
	switch {
	case err != nil:
		l.fail("%v", err)
	case mounted:
		l.ok("mounted at %s", path)
	case !onNodesMounts():
		l.warn("not mounted; ztunnel would mount it at %s in a mount namespace of its own, and what is pinned goes with that: pods are then in plaintext, not refused", path)
	default:
		l.ok("not mounted; ztunnel mounts it at %s, and it stays", path)
	}
}

// onNodesMounts says whether the process is in the mount namespace of the node: of
// its first process, where that can be seen.
func onNodesMounts() bool {
	var own, first unix.Stat_t
	return redirect.InitialNamespace("pid") && unix.Stat("/proc/self/ns/mnt", &own) == nil &&
		unix.Stat("/proc/1/ns/mnt", &first) == nil && own.Ino == first.Ino
}

// fileSystems are those that a run folder is met on (linux/magic.h).
var fileSystems = map[int64]string{
	unix.TMPFS_MAGIC: "tmpfs", unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.NFS_SUPER_MAGIC: "NFS", unix.SMB2_SUPER_MAGIC: "SMB", unix.V9FS_MAGIC: "9p", unix.FUSE_SUPER_MAGIC: "FUSE",
}

// runFolder does what the daemon does there, in a folder of its own.
func runFolder(l *look) {
	at := l.Config.RunDir
	for {
		info, err := os.Stat(at)
		if err == nil && !info.IsDir() {
			l.fail("%s is no folder", at)
			return
		}
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			l.fail("%v", err)
			return
		}
		at = filepath.Dir(at)
	}
	if err := tryFolder(at); err != nil {
		l.fail("%v", err)
		return
	}
	l.writable = at // a container may have no other
	var sys unix.Statfs_t
	if err := unix.Statfs(at, &sys); err != nil {
		l.fail("look at the file system of %s: %v", at, err)
		return
	}
	kind, known := fileSystems[int64(sys.Type)]
	if !known {
		kind = fmt.Sprintf("a file system of type %#x", sys.Type)
	}
	switch sys.Type {
	case unix.NFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.V9FS_MAGIC, unix.FUSE_SUPER_MAGIC:
		l.warn("%s is on %s: another machine may share it, and its locks", l.Config.RunDir, kind)
	default:
		l.ok("%s can be written, on %s", l.Config.RunDir, kind)
	}
}

func tryFolder(at string) (err error) {
	dir, err := os.MkdirTemp(at, ".culvert-check-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock a file in %s: %w", at, err)
	}
	// By its folder's descriptor: a socket's path is short.
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	s, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/s", d.Fd())})
	if err != nil {
		return fmt.Errorf("make a socket in %s: %w", at, err)
	}
	return s.Close()
}
