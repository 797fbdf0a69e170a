// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/culvert-mesh/culvert/internal/cli"
)

const (
	// defaultQueue is how many records may wait, where the Config has none.
	defaultQueue = 4096
	// chunkLen is the number of records in one piece of the queue (about 25 KiB).
	chunkLen = 64
	// keptChunks is how many empty pieces are kept for reuse.
	keptChunks = 16
	// writeSize is the number of bytes after which lines are handed to the
	// writer, also when more are waiting.
	writeSize = 64 << 10
	// gather is how long the writer lets lines come together: what bounds its
	// wake-ups, which would otherwise cost an event loop one futex a line.
	gather = 20 * time.Millisecond
)

// AccessLogConfig says where lines go.
type AccessLogConfig struct {
	// Writer takes whole lines, many at once. Needed.
	Writer io.Writer
	// Format is json, text, or auto (also empty): text when Writer is a
	// terminal, JSON otherwise.
	Format string
	// Queue is how many lines may wait for Writer. 0: 4096.
	Queue int
	// Logger hears once when writing begins to go wrong. nil: nobody does.
	Logger *slog.Logger
}

// AccessLog writes one line for each connection that has ended. It never blocks
// who records: when the queue is full, a line is dropped and counted.
type AccessLog struct {
	out    lineWriter
	line   func(b []byte, c *Connection) []byte
	queue  int
	logger *slog.Logger

	mu      sync.Mutex
	pending []*chunk // guarded by mu; all but the last are full
	free    []*chunk // guarded by mu
	waiting int      // guarded by mu; records in pending and with the writer
	closed  bool     // guarded by mu

	wake  chan struct{} // the queue was empty
	hurry chan struct{} // it is half full
	done  chan struct{} // closed by Close
	ended chan struct{} // closed when the writer has ended

	close    sync.Once
	closeErr error
}

// chunk is a piece of the queue, so that it grows without copying.
type chunk struct {
	n       int
	records [chunkLen]Connection
}

// NewAccessLog starts the goroutine that formats and writes.
func NewAccessLog(c AccessLogConfig) (*AccessLog, error) {
	if c.Writer == nil {
		return nil, errors.New("open access log: no writer")
	}
	l := &AccessLog{
		out:    lineWriter{writer: c.Writer},
		queue:  c.Queue,
		logger: c.Logger,
		wake:   make(chan struct{}, 1),
		hurry:  make(chan struct{}, 1),
		done:   make(chan struct{}),
		ended:  make(chan struct{}),
	}
	if l.queue <= 0 {
		l.queue = defaultQueue
	}
	switch c.Format {
	case "json":
		l.line = appendJSON
	case "text":
		l.line = appendText
	case "", "auto":
		l.line = appendJSON
		if cli.IsTerminal(c.Writer) {
			l.line = appendText
		}
	default:
		return nil, fmt.Errorf("open access log: format %q is not one of auto, json, text", c.Format)
	}
	go l.run()
	return l, nil
}

// Record queues the line of a connection that has ended. It copies c, allocates
// next to nothing, and does not wait for the writer. Safe for concurrent use.
func (l *AccessLog) Record(c *Connection) {
	l.mu.Lock()
	if l.closed || l.waiting >= l.queue {
		l.mu.Unlock()
		l.out.dropped.Add(1)
		return
	}
	n := len(l.pending)
	first := n == 0
	if first || l.pending[n-1].n == chunkLen {
		l.pending = append(l.pending, l.chunk())
		n++
	}
	last := l.pending[n-1]
	last.records[last.n] = *c
	last.n++
	l.waiting++
	half := l.waiting == (l.queue+1)/2
	l.mu.Unlock()
	if first {
		signal(l.wake)
	}
	if half {
		signal(l.hurry)
	}
}

// chunk returns an empty piece. The caller holds mu.
func (l *AccessLog) chunk() *chunk {
	if n := len(l.free); n > 0 {
		c := l.free[n-1]
		l.free = l.free[:n-1]
		return c
	}
	return new(chunk)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Written counts the lines that the writer has taken.
func (l *AccessLog) Written() uint64 { return l.out.written.Load() }

// Dropped counts the lines that are lost: the queue was full, the writer gave an
// error, or the log was closed.
func (l *AccessLog) Dropped() uint64 { return l.out.dropped.Load() }

// Waiting is how many lines are queued, those that are being written among them.
func (l *AccessLog) Waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.waiting
}

// Close writes what is queued and ends the goroutine. A writer that takes
// nothing for 2 s is left to itself, with an error that says so: the goroutine
// then ends when the writer returns. Idempotent.
func (l *AccessLog) Close() error {
	l.close.Do(func() {
		l.mu.Lock()
		l.closed = true
		l.mu.Unlock()
		close(l.done)
		if !l.out.drained(l.ended) {
			l.closeErr = fmt.Errorf("close access log: its writer has taken nothing for %s; %d lines are lost", closeWait, l.Waiting())
		}
	})
	return l.closeErr
}

// run is the writer's goroutine.
func (l *AccessLog) run() {
	defer close(l.ended)
	timer := time.NewTimer(gather)
	timer.Stop()
	buf := make([]byte, 0, 4<<10)
	failing := false
	defer l.out.end()
	for closing := false; !closing; {
		select {
		case <-l.wake:
			timer.Reset(gather)
			select {
			case <-timer.C:
			case <-l.hurry:
			case <-l.done:
			}
			timer.Stop()
		case <-l.done:
			closing = true // what is recorded from now on is refused
		}
		chunks := l.take()
		for i, c := range chunks {
			for j := range c.records[:c.n] {
				buf = l.line(buf, &c.records[j])
				if len(buf) >= writeSize {
					failing = l.write(buf, failing)
					buf = buf[:0]
				}
			}
			if i == len(chunks)-1 && len(buf) > 0 {
				failing = l.write(buf, failing)
				buf = buf[:0]
			}
			l.release(c)
		}
		if cap(buf) > 2*writeSize {
			buf = make([]byte, 0, 4<<10)
		}
	}
}

func (l *AccessLog) take() []*chunk {
	l.mu.Lock()
	defer l.mu.Unlock()
	chunks := l.pending
	l.pending = nil
	return chunks
}

// release makes room for as many records as the piece had.
func (l *AccessLog) release(c *chunk) {
	n := c.n
	clear(c.records[:n]) // the strings are not ours to keep
	c.n = 0
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting -= n
	if len(l.free) < keptChunks {
		l.free = append(l.free, c)
	}
}

// write hands lines to the writer, and tells the logger of the first of several
// failures.
func (l *AccessLog) write(b []byte, failing bool) bool {
	err := l.out.write(b)
	if err != nil && !failing && l.logger != nil {
		l.logger.Warn("access log cannot be written; lines are dropped until it can", "error", err)
	}
	return err != nil
}
