// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// requests are exchanges between two pods, of clients that do not try again: one
// half of them on connections that stay, each other one on a connection of its own.
type requests struct {
	kept, single atomic.Int64 // that were answered
	failed       atomic.Int64
	slowest      atomic.Int64 // ns
	stop         context.CancelFunc
	wg           sync.WaitGroup

	mu    sync.Mutex
	first error
}

// requests begins with rate requests a second, of eight clients of each kind. A
// client that is late makes up for it, so that so many are asked for whatever the
// machine is busy with.
func (e *env) requests(from *lab.Pod, to netip.AddrPort, rate int) *requests {
	e.t.Helper()
	const clients = 8
	return e.keepAsking(from, to, clients, 2*clients*time.Second/time.Duration(rate))
}

// steady begins with one client of each kind, that asks again as soon as it is
// answered: what is amiss for a moment is seen.
func (e *env) steady(from *lab.Pod, to netip.AddrPort) *requests {
	e.t.Helper()
	return e.keepAsking(from, to, 1, 0)
}

// keepAsking begins with some clients of each kind, each of which asks every so often.
func (e *env) keepAsking(from *lab.Pod, to netip.AddrPort, clients int, every time.Duration) *requests {
	e.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &requests{stop: cancel}
	fail := func(err error) {
		r.failed.Add(1)
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.first == nil {
			r.first = fmt.Errorf("%s: %w", time.Now().Format(time.TimeOnly), err)
		}
	}
	dial := func() (*net.TCPConn, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience())
		defer cancel()
		return from.Dial(ctx, to)
	}
	each := func(f func()) {
		r.wg.Go(func() {
			// Who asks without a pause stops at a failure: he may be refused at once.
			for next := time.Now().Add(every); every > 0 || r.failed.Load() == 0; next = next.Add(every) {
				select {
				case <-ctx.Done():
					return
				case <-time.After(time.Until(next)):
					begun := time.Now()
					f()
					took := int64(time.Since(begun))
					for most := r.slowest.Load(); took > most && !r.slowest.CompareAndSwap(most, took); most = r.slowest.Load() {
					}
				}
			}
		})
	}
	for range clients {
		c, err := dial()
		e.must(err)
		e.t.Cleanup(func() { c.Close() })
		each(func() {
			_ = c.SetDeadline(time.Now().Add(2 * patience()))
			if err := exchange(c, marker); err != nil {
				fail(fmt.Errorf("on a connection that stays: %w", err))
				return
			}
			r.kept.Add(1)
		})
		each(func() {
			c, err := dial()
			if err != nil {
				fail(err)
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(2 * patience()))
			if err := exchange(c, marker); err != nil {
				fail(err)
				return
			}
			_ = c.CloseWrite()
			if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
				fail(fmt.Errorf("at the end: %q, %w", rest, err))
				return
			}
			r.single.Add(1)
		})
	}
	e.t.Cleanup(func() { cancel(); r.wg.Wait() })
	return r
}

// whole ends the requests and wants all of them answered.
func (r *requests) whole(t *testing.T, atLeast int64) {
	t.Helper()
	r.stop()
	r.wg.Wait()
	kept, single, failed := r.kept.Load(), r.single.Load(), r.failed.Load()
	t.Logf("%d requests: %d on connections that stayed, %d on one each, %d failed; the slowest took %v", kept+single+failed, kept, single, failed, time.Duration(r.slowest.Load()).Round(time.Millisecond))
	if failed > 0 {
		t.Errorf("%d requests failed, the first %v", failed, r.first)
	}
	if min(kept, single) < atLeast {
		t.Errorf("there were few requests, want %d of each kind", atLeast)
	}
}
