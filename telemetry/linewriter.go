// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"bytes"
	"io"
	"sync/atomic"
	"time"
)

// closeWait is how long a Close waits for a writer that takes nothing.
const closeWait = 2 * time.Second

// lineWriter hands whole lines to a writer and counts them: what a queue has behind
// it. Of a line that a full disk has torn the rest is kept, to be written before the
// next one. All but the counters is of the queue's goroutine.
type lineWriter struct {
	writer io.Writer
	torn   []byte // the rest of a line

	written atomic.Uint64
	dropped atomic.Uint64
}

// write hands lines to the writer. Those that it does not take are dropped.
func (l *lineWriter) write(b []byte) error {
	if len(l.torn) > 0 {
		n, err := l.writer.Write(l.torn)
		if l.torn = l.torn[n:]; err != nil {
			l.dropped.Add(lines(b))
			return err
		}
		l.written.Add(1)
	}
	n, err := l.writer.Write(b)
	l.written.Add(lines(b[:n]))
	if n > 0 && b[n-1] != '\n' {
		end := n + bytes.IndexByte(b[n:], '\n') + 1
		l.torn, n = bytes.Clone(b[n:end]), end
	}
	l.dropped.Add(lines(b[n:]))
	return err
}

// end drops what is left of a line.
func (l *lineWriter) end() {
	if len(l.torn) > 0 {
		l.dropped.Add(1)
	}
}

// drained waits until the queue's goroutine has ended, and gives up a writer that
// takes nothing for closeWait.
func (l *lineWriter) drained(ended <-chan struct{}) bool {
	for {
		before := l.written.Load()
		select {
		case <-ended:
			return true
		case <-time.After(closeWait):
		}
		if l.written.Load() == before {
			return false
		}
	}
}

func lines(p []byte) uint64 { return uint64(bytes.Count(p, []byte("\n"))) }
