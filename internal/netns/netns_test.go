// SPDX-License-Identifier: Apache-2.0

package netns_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/internal/testns"
)

// inode tells the calling thread's namespace.
func inode() (uint64, error) {
	var st unix.Stat_t
	err := unix.Stat("/proc/thread-self/ns/net", &st)
	return st.Ino, err
}

func TestDo(t *testing.T) {
	ns, name := testns.Named(t)
	home, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	if home.Cookie() == ns.Cookie() {
		t.Fatal("two namespaces with one cookie")
	}
	again, err := netns.Open(filepath.Join(netns.Dir, name))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.Cookie() != ns.Cookie() {
		t.Errorf("cookies %d and %d of one namespace", again.Cookie(), ns.Cookie())
	}
	// A new namespace has lo and nothing else.
	err = ns.Do(func() error {
		links, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Name == "eth0" {
				t.Errorf("there is a %s", l.Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// What f says comes back.
	want := errors.New("no")
	if err := ns.Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
}

// Do changes the namespace of no other thread, and of its own only for f's time.
func TestDoComesBack(t *testing.T) {
	ns := testns.New(t)
	home, err := inode()
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	for range 32 {
		wait.Go(func() {
			for range 8 {
				err := ns.Do(func() error {
					in, err := inode()
					if err == nil && in == home {
						err = errors.New("f runs at home")
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
				if in, err := inode(); err != nil || in != home {
					t.Errorf("a thread is in namespace %d, not %d (%v)", in, home, err)
				}
			}
		})
	}
	wait.Wait()
}

// A test that fails in f ends f's goroutine: whoever waits must not wait for ever.
func TestDoOfGoexit(t *testing.T) {
	ns := testns.New(t)
	if err := ns.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("no error")
	}
}

func TestOpenRefuses(t *testing.T) {
	if _, err := netns.Open(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a path that does not exist: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := netns.Open(file); err == nil || !strings.Contains(err.Error(), "/run/netns") {
		t.Errorf("a file: %v, want a word on what is expected", err)
	}
	// Another kind of namespace.
	if ns, err := netns.Open("/proc/self/ns/mnt"); err == nil {
		ns.Close()
		t.Error("a mount namespace is taken")
	}
}

func TestClosed(t *testing.T) {
	ns := testns.New(t)
	if err := ns.Close(); err != nil {
		t.Fatal(err)
	}
	if err := ns.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	if err := ns.Do(func() error { t.Error("f runs"); return nil }); err == nil {
		t.Error("a closed handle can be entered")
	}
}

func TestNamed(t *testing.T) {
	_, name := testns.Named(t)
	if ns, err := netns.CreateNamed(name); err == nil {
		ns.Close()
		t.Error("a name is taken twice")
	} else if _, err := netns.Open(filepath.Join(netns.Dir, name)); err != nil {
		t.Errorf("the first is gone: %v", err)
	}
	if err := netns.DeleteNamed(name); err != nil {
		t.Fatal(err)
	}
	if err := netns.DeleteNamed(name); err != nil {
		t.Errorf("deleted again: %v", err)
	}
	if _, err := os.Stat(filepath.Join(netns.Dir, name)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the mount point is still there: %v", err)
	}
}
