// SPDX-License-Identifier: Apache-2.0

// Package netns enters network namespaces, and is the only place that does. It
// enters nothing else: mounts and cgroups stay the caller's, so that bpffs and
// cgroup2 are where they were. (`ip netns exec` remounts /sys and hides both.)
//
// Who opens an NS closes it.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Dir is where named namespaces are mounted, as iproute2 does.
const Dir = "/run/netns"

// NS is a handle of a network namespace. It keeps the namespace alive.
type NS struct {
	f      *os.File
	cookie uint64
}

// Open opens the namespace at path: a mount below /run/netns, or
// /proc/PID/ns/net.
func Open(path string) (*NS, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return nil, fmt.Errorf("open network namespace %s: it is no namespace (give a path like /run/netns/NAME or /proc/PID/ns/net)", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	ns := &NS{f: f}
	if err := ns.Do(ns.readCookie); err != nil {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return ns, nil
}

// Current opens the calling thread's namespace.
func Current() (*NS, error) { return Open("/proc/thread-self/ns/net") }

// New makes a namespace without a name: it goes with its last handle, and with
// whatever process or socket is in it by then. Nothing is left if the process dies.
func New() (*NS, error) {
	var ns *NS
	here, err := Current()
	if err != nil {
		return nil, err
	}
	defer here.Close()
	err = here.Do(func() error { // which also brings the thread back
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		var err error
		ns, err = Current()
		return err
	})
	if err != nil && ns != nil {
		err = errors.Join(err, ns.Close())
		ns = nil
	}
	return ns, err
}

func (n *NS) readCookie() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket: %w", err)
	}
	defer unix.Close(fd)
	n.cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return fmt.Errorf("read namespace cookie: %w", err)
	}
	return nil
}

// Cookie is the namespace's number for as long as the machine runs, the same
// that bpf_get_netns_cookie gives.
func (n *NS) Cookie() uint64 { return n.cookie }

// FD is the handle's descriptor. It stays the handle's.
func (n *NS) FD() int { return int(n.f.Fd()) }

// Close closes the handle. Idempotent.
func (n *NS) Close() error {
	if err := n.f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Do runs f in the namespace, on a goroutine locked to its thread; what f starts
// in other goroutines runs elsewhere. If the way back fails, or f ends its
// goroutine, the thread stays locked and dies with that goroutine.
func (n *NS) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		defer close(done)
		done <- n.do(f)
	}()
	err, ok := <-done
	if !ok {
		return errors.New("what ran in the network namespace has ended its goroutine")
	}
	return err
}

func (n *NS) do(f func() error) error {
	runtime.LockOSThread()
	back, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("remember network namespace: %w", err)
	}
	defer back.Close()
	if err := n.Enter(); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	err = f()
	if berr := unix.Setns(int(back.Fd()), unix.CLONE_NEWNET); berr != nil {
		return errors.Join(err, fmt.Errorf("return from network namespace: %w", berr))
	}
	runtime.UnlockOSThread()
	return err
}

// Enter moves the calling thread, which must be locked and not be needed
// elsewhere, into the namespace. There is no way back.
func (n *NS) Enter() error {
	if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return nil
}

// CreateNamed makes a namespace and mounts it below Dir.
func CreateNamed(name string) (ns *NS, err error) {
	path := filepath.Join(Dir, name)
	if err := os.MkdirAll(Dir, 0o755); err != nil {
		return nil, fmt.Errorf("create network namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return nil, fmt.Errorf("create network namespace: %w", err)
	}
	f.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, DeleteNamed(name))
		}
	}()
	if ns, err = New(); err != nil {
		return nil, err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", ns.FD()), path, "", unix.MS_BIND, ""); err != nil {
		return nil, errors.Join(fmt.Errorf("mount network namespace at %s: %w", path, err), ns.Close())
	}
	return ns, nil
}

// DeleteNamed unmounts a namespace that CreateNamed has made; it lives on while
// somebody uses it. A name that does not exist is no error.
func DeleteNamed(name string) error {
	path := filepath.Join(Dir, name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete network namespace %s: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete network namespace: %w", err)
	}
	return nil
}
