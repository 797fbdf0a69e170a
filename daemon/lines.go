// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"sync"
)

// maxLines is how many bytes of the daemon's own log are kept in memory.
const maxLines = 128 << 10

// Lines keeps the last lines of the daemon's own log, for a report of a bug: where
// its standard error goes is the service manager's. It is an io.Writer that takes
// whole lines and never fails. Its methods are safe for concurrent use, and its
// zero value is ready.
type Lines struct {
	mu   sync.Mutex // guards kept
	kept []byte
}

// Write is io.Writer's.
func (l *Lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept = append(l.kept, p...)
	if len(l.kept) > 2*maxLines {
		l.kept = append([]byte(nil), tail(l.kept)...)
	}
	return len(p), nil
}

// Last returns the lines that are kept.
func (l *Lines) Last() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(tail(l.kept))
}

// tail is the last maxLines bytes, less a line that is not whole.
func tail(b []byte) []byte {
	if len(b) <= maxLines {
		return b
	}
	b = b[len(b)-maxLines:]
	_, b, _ = bytes.Cut(b, []byte("\n"))
	return b
}
