// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// saidEverySecond is how many lines of one kind a peer can make the log have in
// a second. What is beyond is counted by its metric, and in the next line.
const saidEverySecond = 50

// damper bounds lines of the log. Its zero value is ready for use.
type damper struct {
	unsaid atomic.Uint64 // lines in all that were not written

	mu    sync.Mutex // guards what follows
	since time.Time
	said  int
	held  int // lines since the last one
}

// warn writes a line, unless there are too many like it, and says how many had
// none before it.
func (d *damper) warn(log *slog.Logger, msg string, args ...any) {
	held, ok := d.say(time.Now())
	if !ok {
		return
	}
	if held > 0 {
		args = append(args, "unsaid", held)
	}
	log.Warn(msg, args...)
}

// say reports whether a line may be written, and how many were not before it.
func (d *damper) say(now time.Time) (held int, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now.Sub(d.since) >= time.Second {
		d.since, d.said = now, 0
	}
	if d.said >= saidEverySecond {
		d.held++
		d.unsaid.Add(1)
		return 0, false
	}
	d.said++
	held, d.held = d.held, 0
	return held, true
}

// Unsaid has what the log is about that a peer can cause, with how many lines it
// lacks since there were too many in a second.
func (t *Tunnel) Unsaid() map[string]uint64 {
	return map[string]uint64{"peers": t.failed.unsaid.Load(), "memory": t.hoarded.unsaid.Load()}
}
