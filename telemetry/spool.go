// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"fmt"
	"io"
	"sync"
)

// maxSpool is how many bytes of lines wait for a slow reader; as many again may be
// with the writer.
const maxSpool = 1 << 20

// Spool is an io.Writer for the daemon's own log that never waits for who reads
// it: event loops log too, and a pipe that nobody empties would stop them and all
// that they carry. Lines beyond maxSpool are dropped and counted. Each Write is to
// be a whole line, or several. Safe for concurrent use; Close ends its goroutine.
type Spool struct {
	out lineWriter

	mu      sync.Mutex
	waiting []byte // guarded by mu
	closed  bool   // guarded by mu

	wake  chan struct{}
	done  chan struct{} // closed by Close
	ended chan struct{} // closed when the writer has ended

	close    sync.Once
	closeErr error
}

// NewSpool starts the goroutine that writes.
func NewSpool(w io.Writer) *Spool {
	s := &Spool{out: lineWriter{writer: w}, wake: make(chan struct{}, 1), done: make(chan struct{}), ended: make(chan struct{})}
	go s.run()
	return s
}

// Write is io.Writer's. It returns no error.
func (s *Spool) Write(p []byte) (int, error) {
	s.mu.Lock()
	full := s.closed || len(s.waiting)+len(p) > maxSpool
	if !full {
		s.waiting = append(s.waiting, p...)
	}
	s.mu.Unlock()
	if full {
		s.out.dropped.Add(lines(p))
	} else {
		signal(s.wake)
	}
	return len(p), nil
}

// Dropped counts the lines that are lost: there was no room, the writer gave an
// error, or the spool was closed.
func (s *Spool) Dropped() uint64 { return s.out.dropped.Load() }

func (s *Spool) run() {
	defer close(s.ended)
	defer s.out.end()
	var p []byte
	for closing := false; !closing; {
		select {
		case <-s.wake:
		case <-s.done:
			closing = true
		}
		s.mu.Lock()
		p, s.waiting = s.waiting, p[:0]
		s.mu.Unlock()
		if len(p) == 0 {
			continue
		}
		_ = s.out.write(p) // what is lost is counted: there is no other log to tell
		if cap(p) > 2*writeSize {
			p = nil
		}
	}
}

// Close writes what waits and ends the goroutine. A writer that takes nothing for
// 2 s is left to itself, with an error that says so. Idempotent.
func (s *Spool) Close() error {
	s.close.Do(func() {
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		close(s.done)
		if !s.out.drained(s.ended) {
			s.closeErr = fmt.Errorf("close log: its writer has taken nothing for %s", closeWait)
		}
	})
	return s.closeErr
}
