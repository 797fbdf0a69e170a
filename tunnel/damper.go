// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"log/slog"
	"sync"
	"time"
)

// saidEverySecond is how many lines of one kind a peer can make the log have in
// a second. What is beyond is counted by its metric, and in the next line.
const saidEverySecond = 50

// damper bounds lines of the log. Its zero value is ready for use.
type damper struct {
	mu    sync.Mutex // guards what follows
	since time.Time
	said  int
	held  int
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
		return 0, false
	}
	d.said++
	held, d.held = d.held, 0
	return held, true
}
