// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"time"

	"golang.org/x/net/http2"
)

// schedule looks at the time limits now and then.
func (t *Trunk) schedule() {
	var d time.Duration
	for _, limit := range [...]time.Duration{t.cfg.PingAfter, t.cfg.DeadAfter, t.cfg.IdleAfter} {
		if limit > 0 && (d == 0 || limit < d) {
			d = limit
		}
	}
	d /= 2
	if end := t.cfg.Until; !end.IsZero() && !t.draining {
		if !t.notice.IsZero() {
			end = t.notice
		}
		if left := time.Until(end); d == 0 || left < d {
			d = max(left, time.Millisecond)
		}
	}
	if d == 0 {
		return
	}
	t.tick = t.w.Loop.After(max(d, time.Millisecond), func() {
		t.check(t.w.Loop.Now())
		if !t.closed {
			t.schedule()
		}
	})
}

func (t *Trunk) check(now time.Time) {
	if !t.notice.IsZero() && now.After(t.notice) {
		t.announce()
	}
	if !t.cfg.Until.IsZero() && now.After(t.cfg.Until) {
		t.Drain()
	}
	silent := now.Sub(t.lastRead)
	switch {
	case t.cfg.DeadAfter > 0 && silent >= t.cfg.DeadAfter && t.asked(now):
		t.close(ErrDead)
	case t.cfg.DeadAfter > 0 && !t.stalled.IsZero() && now.Sub(t.stalled) >= t.cfg.DeadAfter:
		// It may go on sending: what it has us hold for it is to end.
		t.close(ErrUnread)
	case t.cfg.IdleAfter > 0 && t.empty() && now.Sub(t.idleSince) >= t.cfg.IdleAfter && !t.announced:
		if !t.announce() {
			t.s.H2.GoAway(http2.ErrCodeNo, "idle")
			t.close(ErrIdle)
			return
		}
		if end := now.Add(goAwayNotice); t.cfg.Until.IsZero() || end.Before(t.cfg.Until) {
			t.cfg.Until = end
		}
	case t.cfg.PingAfter > 0 && silent >= t.cfg.PingAfter:
		t.ping(now)
	}
}

// announce tells a client that the trunk is about to end, so that it opens nothing
// that would cross the last GOAWAY. It reports false where we are the client: there
// is nobody to tell.
func (t *Trunk) announce() bool {
	t.notice, t.announced = time.Time{}, true
	if !t.s.H2.AnnounceGoAway() {
		return false
	}
	t.wantFlush()
	return true
}

// asked reports whether the peer has had its time to answer. It has not when we
// were the ones that stood still: a suspended machine, a stopped process.
func (t *Trunk) asked(now time.Time) bool {
	return t.cfg.PingAfter == 0 || !t.pingAt.IsZero() && now.Sub(t.pingAt) >= t.cfg.DeadAfter-t.cfg.PingAfter
}

func (t *Trunk) ping(now time.Time) {
	if t.pingAt.IsZero() {
		t.pingAt = now
	}
	t.s.H2.Ping([8]byte{'c', 'u', 'l', 'v', 'e', 'r', 't'})
	t.wantFlush()
}

// measure pings for the round trip, once at a time.
func (t *Trunk) measure(now time.Time) {
	if t.pingAt.IsZero() && t.rtt == 0 {
		t.ping(now)
	}
}

func (t *Trunk) pong() {
	if !t.pingAt.IsZero() {
		d := time.Since(t.pingAt)
		if t.rtt == 0 || d < t.rtt {
			t.rtt = d
		}
		t.pingAt = time.Time{}
	}
}
