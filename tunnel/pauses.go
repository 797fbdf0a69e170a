// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"fmt"
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
	mu    sync.Mutex
	until map[netip.Addr]time.Time // when an address may begin its next session
}

// breach puts an address's next session off.
func (p *pauses) breach(a netip.Addr, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	until, known := p.until[a]
	if !known && len(p.until) >= maxPaused {
		for a, until := range p.until {
			if !until.After(now) {
				delete(p.until, a)
			}
		}
		if len(p.until) >= maxPaused {
			return
		}
	}
	if p.until == nil {
		p.until = map[netip.Addr]time.Time{}
	}
	if until.Before(now) {
		until = now
	}
	if until = until.Add(breachPause); until.After(now.Add(maxPause)) {
		until = now.Add(maxPause)
	}
	p.until[a] = until
}

// next says after what time an address may begin a session, and gives it that turn.
// It reports false where its turn is more than a breachPause away: there is no point
// in waiting, and nobody is to have many wait.
func (p *pauses) next(a netip.Addr, now time.Time) (wait time.Duration, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	until, known := p.until[a]
	if !known {
		return 0, true
	}
	wait = until.Sub(now)
	switch {
	case wait <= 0:
		delete(p.until, a)
		return 0, true
	case wait > breachPause:
		return wait, false
	}
	p.until[a] = until.Add(breachPause)
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
