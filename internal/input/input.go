// SPDX-License-Identifier: Apache-2.0

// Package input reads a file that an operator names: whole, up to a bound, and
// without ever waiting for it. A path may lead anywhere; a named pipe or a
// device there must neither stop the daemon nor be drained by it. The package
// knows no format, and keeps nothing open.
package input

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// Max bounds a file of configuration, in bytes: 16 MiB, some 150,000 workloads.
const Max = 16 << 20

// MaxPEM bounds a file of certificates or keys, in bytes: 1 MiB, some 700 roots.
const MaxPEM = 1 << 20

// Error is a file that cannot be used, and the mend.
type Error struct {
	Path    string
	Problem string
	Mend    string
	Err     error // of the system; nil where it is the file itself that is wrong
}

func (e *Error) Error() string {
	s := e.Path + ": " + e.Problem
	if e.Mend != "" {
		s += ": " + e.Mend
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// Wrong makes an Error of what a file holds.
func Wrong(path, mend, format string, args ...any) *Error {
	return &Error{Path: path, Problem: fmt.Sprintf(format, args...), Mend: mend}
}

// Read reads the file at path, of at most most bytes. Its errors are *Error;
// those of the system are in them.
func Read(path string, most int64) ([]byte, error) {
	f, err := Open(path, most)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return All(f, most)
}

// Open opens a regular file for reading. The caller closes it.
func Open(path string, most int64) (*os.File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, Unusable(path, err)
	}
	// Before it is opened: to open a device may do something.
	if err := check(path, info, most); err != nil {
		return nil, err
	}
	// What is put there in between must not be waited for either.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, Unusable(path, err)
	}
	if info, err = f.Stat(); err == nil {
		err = check(path, info, most)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// All reads what Open has opened.
func All(f *os.File, most int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, Unusable(f.Name(), err)
	}
	if int64(len(data)) > most {
		return nil, tooLarge(f.Name(), int64(len(data)), most)
	}
	return data, nil
}

func check(path string, info fs.FileInfo, most int64) error {
	if !info.Mode().IsRegular() {
		return Wrong(path, "name a regular file", "is %s", kind(info.Mode()))
	}
	if info.Size() > most {
		return tooLarge(path, info.Size(), most)
	}
	return nil
}

func tooLarge(path string, size, most int64) error {
	return Wrong(path, "is it the right file?", "has %d bytes or more, and at most %d are read", size, most)
}

func kind(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "a folder"
	case m&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case m&fs.ModeSocket != 0:
		return "a socket"
	case m&fs.ModeDevice != 0:
		return "a device"
	}
	return "no regular file"
}

// Unusable makes an Error of one that the system has of a path.
func Unusable(path string, err error) *Error {
	e := &Error{Path: path, Problem: err.Error(), Err: err}
	var of *fs.PathError
	if errors.As(err, &of) {
		e.Problem = of.Err.Error() // Path is named already
	}
	link, lerr := os.Readlink(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && lerr == nil:
		e.Problem = "is a symbolic link to " + link + ", which does not exist"
		e.Mend = "put the file there, or the link right"
	case errors.Is(err, fs.ErrNotExist):
		e.Mend = "put it there, or correct the path that names it"
	case errors.Is(err, syscall.ELOOP):
		e.Problem = "is a loop of symbolic links"
		e.Mend = "put the file there, or the links right"
	case errors.Is(err, syscall.ENOTDIR):
		e.Problem = "a part of this path is a file, not a folder"
		e.Mend = "correct the path"
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() == 0:
		e.Mend = "let root read it (`ztunnel run` reads without CAP_DAC_READ_SEARCH)"
	case errors.Is(err, fs.ErrPermission):
		e.Mend = fmt.Sprintf("run as root, or let user %d read it", os.Geteuid())
	}
	return e
}
