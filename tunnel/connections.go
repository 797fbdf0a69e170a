// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/culvert-mesh/culvert/telemetry"
)

// MaxListed bounds what Connections returns, some 400 bytes each.
const MaxListed = 1 << 16

// walk is a way through a worker's connections, beside which they go on.
type walk struct {
	cursor *live // the next
	visit  func(liveConnection)
	done   func()
}

// Connections returns the connections that live now, oldest first, and how many
// there are: more than are returned where those would be more than MaxListed.
// It is no picture of one instant: what comes or goes meanwhile may be missing,
// or be there twice. A record's Duration is the connection's age, and it has no
// Reason yet.
func (t *Tunnel) Connections(ctx context.Context) (list []telemetry.Connection, total int) {
	var mu sync.Mutex // guards list and total
	now := time.Now()
	t.walk(ctx, func(l liveConnection) {
		c := l.seen()
		mu.Lock()
		defer mu.Unlock()
		if total++; len(list) < MaxListed {
			c.Duration = now.Sub(c.Start)
			list = append(list, *c)
		}
	})
	mu.Lock()
	defer mu.Unlock()
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(a, b telemetry.Connection) int { return a.Start.Compare(b.Start) })
	return list, total
}

// Count has the bytes counted that live connections have moved by now. Those of
// a loop that has not got to it when ctx ends are counted the next time.
func (t *Tunnel) Count(ctx context.Context) { t.walk(ctx, liveConnection.count) }

// walk calls visit for each connection, on the loop that it is on, until all are
// visited or ctx ends; what is under way then still ends. Each loop visits its own
// in bounded turns.
func (t *Tunnel) walk(ctx context.Context, visit func(liveConnection)) {
	ended := make(chan struct{}, len(t.workers))
	done := func() { ended <- struct{}{} }
	for _, w := range t.workers {
		k := &walk{visit: visit, done: done}
		if !w.Loop.Post(func() { w.walk(k) }) {
			done()
		}
	}
	for range t.workers {
		select {
		case <-ended:
		case <-ctx.Done():
			return
		case <-t.ctx.Done():
			return
		}
	}
}

// walk begins a walk.
func (w *worker) walk(k *walk) {
	if w.lives.walks == nil {
		w.lives.walks = map[*walk]struct{}{}
	}
	k.cursor = w.lives.head
	w.lives.walks[k] = struct{}{}
	w.step(k)
}

// step is one turn's share of a walk.
func (w *worker) step(k *walk) {
	for range recheckShare {
		at := k.cursor
		if at == nil {
			delete(w.lives.walks, k)
			k.done()
			return
		}
		k.cursor = at.next
		k.visit(at.conn)
	}
	w.Loop.After(0, func() { w.step(k) })
}

// moved is how many bytes have come from the client, and how many gone to it.
func (o *outbound) moved() (fromClient, toClient uint64) {
	if o.relay == nil {
		return 0, 0
	}
	return o.relay.Sent(), o.relay.Received()
}

func (o *outbound) count() { o.flow.Progress(o.moved()) }

// seen is the record of a connection that goes on.
func (o *outbound) seen() *telemetry.Connection {
	c := o.record()
	c.FromClient, c.ToClient = o.moved()
	return c
}

// moved is how many bytes have come from the client, and how many gone to it.
func (i *inbound) moved() (fromClient, toClient uint64) {
	if i.relay == nil {
		return 0, 0
	}
	return i.relay.Received(), i.relay.Sent()
}

func (i *inbound) count() { i.flow.Progress(i.moved()) }

// seen is the record of a connection that goes on.
func (i *inbound) seen() *telemetry.Connection {
	c := i.record()
	c.FromClient, c.ToClient = i.moved()
	return c
}
