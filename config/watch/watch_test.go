// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// looker looks at a file twice, as two ticks do.
type looker struct {
	t    *testing.T
	dir  string
	path string
	f    *File
}

func start(t *testing.T, text string) looker {
	t.Helper()
	dir := t.TempDir()
	l := looker{t, dir, filepath.Join(dir, "f"), New(filepath.Join(dir, "f"))}
	l.write(l.path, text)
	if data, err := l.f.Read(); err != nil || string(data) != text {
		t.Fatalf("read %q, %v", data, err)
	}
	return l
}

func (l looker) write(path, text string) {
	l.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

func (l looker) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// changes returns what two looks find; "-": nothing.
func (l looker) changes() string {
	l.t.Helper()
	for range 2 {
		data, changed, err := l.f.Changed()
		switch {
		case changed && errors.Is(err, fs.ErrNotExist):
			return "gone"
		case changed && err != nil:
			return err.Error()
		case changed:
			return string(data)
		}
	}
	return "-"
}

func (l looker) want(what, want string) {
	l.t.Helper()
	if got := l.changes(); got != want {
		l.t.Errorf("%s: %q, want %q", what, got, want)
	}
	if got := l.changes(); got != "-" {
		l.t.Errorf("%s: is found again: %q", what, got)
	}
}

func TestChangesAreFound(t *testing.T) {
	l := start(t, "one")
	l.want("nothing", "-")
	l.write(l.path, "two") // in place, same size, perhaps the same tick
	l.want("written in place", "two")
	l.write(filepath.Join(l.dir, "new"), "three")
	l.must(os.Rename(filepath.Join(l.dir, "new"), l.path))
	l.want("renamed over", "three")
	l.must(os.Remove(l.path))
	l.want("removed", "gone")
	l.write(l.path, "three")
	l.want("there again", "three")
	l.must(os.Chtimes(l.path, time.Time{}, time.Now().Add(-time.Hour)))
	l.want("touched", "-")
	l.write(l.path, "four!")
	l.must(os.Chtimes(l.path, time.Time{}, time.Now().Add(-time.Hour)))
	l.want("old by its time", "four!")
}

// As a ConfigMap is switched: the file is a link into a folder that is a link.
func TestSwitchedLinks(t *testing.T) {
	l := start(t, "zero")
	l.must(os.Remove(l.path))
	for _, v := range []string{"1", "2"} {
		l.must(os.Mkdir(filepath.Join(l.dir, v), 0o700))
		l.write(filepath.Join(l.dir, v, "f"), "version "+v)
	}
	l.must(os.Symlink("1", filepath.Join(l.dir, "data")))
	l.must(os.Symlink("data/f", l.path))
	l.want("by links", "version 1")
	l.must(os.Symlink("2", filepath.Join(l.dir, "data.new")))
	l.must(os.Rename(filepath.Join(l.dir, "data.new"), filepath.Join(l.dir, "data")))
	l.want("switched", "version 2")
}

// Half of a file is not taken for the whole while it grows.
func TestGrowingFileIsLeftAlone(t *testing.T) {
	l := start(t, "whole")
	w, err := os.OpenFile(l.path, os.O_WRONLY|os.O_TRUNC, 0)
	l.must(err)
	defer w.Close()
	for range 5 {
		_, err := w.WriteString("part ")
		l.must(err)
		if data, changed, err := l.f.Changed(); changed {
			t.Errorf("taken while it is written: %q, %v", data, err)
		}
	}
	l.want("written", "part part part part part ")
}

func TestReadTellsNow(t *testing.T) {
	l := start(t, "one")
	l.write(l.path, "two")
	if data, err := l.f.Read(); err != nil || string(data) != "two" {
		t.Errorf("read %q, %v", data, err)
	}
	l.want("after it was read", "-")
	l.must(os.Remove(l.path))
	if _, err := l.f.Read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("read: %v", err)
	}
	l.want("told already", "-")
}

// A file that is emptied is an accident; one that was always empty is none.
func TestEmptiedFileIsAnError(t *testing.T) {
	l := start(t, "one")
	l.write(l.path, "\n")
	l.want("emptied", (&EmptyError{l.path}).Error())
	l.write(l.path, "one")
	l.want("filled again", "one")
	start(t, "")
}

// A pipe in the place of a file is an error, told once, and not waited for.
func TestPipeIsNotWaitedFor(t *testing.T) {
	l := start(t, "one")
	l.must(os.Remove(l.path))
	l.must(syscall.Mkfifo(l.path, 0o600))
	l.want("a pipe", l.path+": is a named pipe: name a regular file")
	l.must(os.Remove(l.path))
	l.write(l.path, "one")
	l.want("a file again", "one")
}
