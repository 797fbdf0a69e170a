// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"
	"time"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

const (
	// breachPause is how long an address waits for its next session after one that
	// broke the protocol's rules or went beyond a bound. A peer could begin the next
	// one at once otherwise, with a new session's budgets.
	breachPause = time.Second

	// maxPause is how far breaches can put off an address's next session, those of
	// many sessions at once, too.
	maxPause = 10 * time.Second

	// maxPaused is how many addresses wait at once. Of more than these none waits
	// that comes later, as none did before: the list is there to spare the node
	// work, and is not to be the attack.
	maxPaused = 4096
)

// pausedError is why a session is not begun.
type pausedError struct{ left time.Duration }

func (e *pausedError) Error() string {
	return fmt.Sprintf("the peer has broken the rules of a session: it may begin another in %s", e.left.Round(time.Millisecond))
}

// pauses has the addresses of peers wait that broke the rules of a session. The zero
// value is ready for use.
type pauses struct {
	mu sync.Mutex
	of map[netip.Addr]pause
}

// pause is an address's.
type pause struct {
	until  time.Time
	waited bool // somebody waits for its end
}

// breach puts an address's next session off.
func (p *pauses) breach(a netip.Addr, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	is, known := p.of[a]
	if !known && len(p.of) >= maxPaused {
		maps.DeleteFunc(p.of, func(_ netip.Addr, is pause) bool { return !is.until.After(now) })
		if len(p.of) >= maxPaused {
			return
		}
	}
	if p.of == nil {
		p.of = map[netip.Addr]pause{}
	}
	if is.until.Before(now) {
		is.until = now
	}
	is = pause{until: is.until.Add(breachPause)}
	if last := now.Add(maxPause); is.until.After(last) {
		is.until = last
	}
	p.of[a] = is
}

// next says how long an address has to wait for its next session, and whether it may:
// one may wait, and for a breachPause at most, so that nobody has many wait here.
func (p *pauses) next(a netip.Addr, now time.Time) (wait time.Duration, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	is, known := p.of[a]
	if !known {
		return 0, true
	}
	wait = is.until.Sub(now)
	switch {
	case wait <= 0:
		delete(p.of, a)
		return 0, true
	case wait > breachPause || is.waited:
		return wait, false
	}
	is.waited = true
	p.of[a] = is
	return wait, true
}

// sleep waits, and reports whether it could.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// breached reports whether a session was ended for what its peer did.
func breached(err error) bool {
	var frames *h2.ConnError
	var records *record.LocalAlert
	return errors.As(err, &frames) || errors.As(err, &records)
}
