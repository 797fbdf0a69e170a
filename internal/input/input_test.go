// SPDX-License-Identifier: Apache-2.0

package input

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What is no regular file is named as what it is, at once: nothing is waited for.
func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(syscall.Mkfifo(in("pipe"), 0o600))
	must(os.Mkdir(in("folder"), 0o700))
	must(os.Symlink("nowhere", in("dangling")))
	must(os.Symlink("loop", in("loop")))
	must(os.Symlink("pipe", in("to-pipe")))
	must(os.WriteFile(in("large"), make([]byte, 11), 0o600))
	must(os.WriteFile(in("full"), make([]byte, 10), 0o600))
	l, err := net.Listen("unix", in("socket"))
	must(err)
	defer l.Close()
	for name, want := range map[string]string{
		in("pipe"):     "is a named pipe: name a regular file",
		in("to-pipe"):  "is a named pipe: name a regular file",
		in("folder"):   "is a folder: name a regular file",
		in("socket"):   "is a socket: name a regular file",
		"/dev/zero":    "is a device: name a regular file",
		in("dangling"): "is a symbolic link to nowhere, which does not exist: put the file there, or the link right",
		in("loop"):     "is a loop of symbolic links: put the file there, or the links right",
		in("none"):     "no such file or directory: put it there, or correct the path that names it",
		in("full/x"):   "a part of this path is a file, not a folder: correct the path",
		in("large"):    "has 11 bytes or more, and at most 10 are read: is it the right file?",
	} {
		begin := time.Now()
		_, err := Read(name, 10)
		var e *Error
		if !errors.As(err, &e) || err.Error() != name+": "+want {
			t.Errorf("got  %v\nwant %s: %s", err, name, want)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("%s took %s", name, took)
		}
	}
	if _, err := Read(in("none"), 10); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v is not fs.ErrNotExist", err)
	}
	if data, err := Read(in("full"), 10); err != nil || len(data) != 10 {
		t.Errorf("a file of the largest size: %d bytes, %v", len(data), err)
	}
}

// A file of unknown size, as in /proc, is bounded as it is read.
func TestReadIsBoundedBySize(t *testing.T) {
	if _, err := Read("/proc/self/status", 10); err == nil || !strings.Contains(err.Error(), "at most 10") {
		t.Errorf("got %v", err)
	}
	if data, err := Read("/proc/self/status", Max); err != nil || len(data) < 10 {
		t.Errorf("got %d bytes, %v", len(data), err)
	}
}
