// SPDX-License-Identifier: Apache-2.0

// Package watch reads a file again when it has changed. It looks at the file
// now and then rather than be told by inotify: that works the same for a file
// that is written in place, renamed over, or reached by a symbolic link that is
// switched (as a ConfigMap's), on every file system, and has no queue that can
// overflow. It knows no format, and waits for no file (package input).
package watch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/culvert-mesh/culvert/internal/input"
)

// every is how often a file is looked at: one stat(2), about a microsecond.
const every = 250 * time.Millisecond

// Run calls look, which asks files whether they have changed, now and then until ctx
// ends.
func Run(ctx context.Context, look func()) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			look()
		}
	}
}

// settled is how old a file must be when it is read for its times to tell a
// later change: the clock of file systems ticks each 1-10 ms, and some know
// whole seconds only.
const settled = 2 * time.Second

// File is a file whose changes are looked for. Its methods are safe for
// concurrent use. Nothing needs closing.
type File struct {
	path string

	mu      sync.Mutex // guards what follows
	seen    stamp      // at the last look
	read    stamp      // when it was read last; zero: read it again in any case
	sum     [sha256.Size]byte
	filled  bool   // it was read once, and held something
	failure string // the error of the last read; empty: none
}

// EmptyError says of a file that held something that it holds nothing. That is
// an accident rather than a change, a full disk for one, and would release every
// pod or lift every rule.
type EmptyError struct{ Path string }

func (e *EmptyError) Error() string {
	return e.Path + ":1: the file is empty by now; where nothing is meant to be listed, write an empty list ([])"
}

// stamp tells one state of a file from another.
type stamp struct {
	there    bool
	size     int64
	modified time.Time
	info     fs.FileInfo // for os.SameFile
}

func (s stamp) same(o stamp) bool {
	return s.there == o.there && (!s.there || s.size == o.size && s.modified.Equal(o.modified) && os.SameFile(s.info, o.info))
}

// New makes a File of a path. It reads nothing yet.
func New(path string) *File { return &File{path: path} }

// Path is the file's.
func (f *File) Path() string { return f.path }

// Read reads the file now.
func (f *File) Read() ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen = look(f.path)
	data, _, err := f.load(f.seen)
	return data, err
}

// Changed reads the file if it is another than at the last read, and stays as
// it is: one that is being written is left for the next look, so that half of
// it is not taken for the whole. changed is also true when the file cannot be
// read, the first time that it cannot for this reason.
func (f *File) Changed() (data []byte, changed bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before, now := f.seen, look(f.path)
	f.seen = now
	if now.same(f.read) && f.read.old() || !now.same(before) {
		return nil, false, nil
	}
	return f.load(now)
}

// old reports whether a change after the stamp was taken would show in it.
func (s stamp) old() bool { return !s.there || time.Since(s.modified) > settled }

func look(path string) stamp {
	fi, err := os.Stat(path)
	if err != nil {
		return stamp{}
	}
	return stamp{there: true, size: fi.Size(), modified: fi.ModTime(), info: fi}
}

// load reads the file. The caller holds mu.
func (f *File) load(now stamp) (data []byte, changed bool, err error) {
	data, err = input.Read(f.path, input.Max)
	if err == nil && f.filled && len(bytes.TrimSpace(data)) == 0 {
		err = &EmptyError{f.path}
	}
	if err != nil {
		changed = f.failure != err.Error()
		f.failure, f.read = err.Error(), stamp{}
		return nil, changed, err
	}
	sum := sha256.Sum256(data)
	changed = f.failure != "" || sum != f.sum
	f.failure, f.read, f.sum = "", now, sum
	f.filled = f.filled || len(bytes.TrimSpace(data)) > 0
	return data, changed, nil
}
