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

// listing is one walk through a worker's connections.
type listing struct {
	cursor *live // the next
	take   func(*telemetry.Connection)
	done   func()
}

// Connections returns the connections that live now, oldest first, and how many
// there are: more than are returned where those would be more than MaxListed.
// Each loop tells of its own in bounded turns, so that it is no picture of one
// instant: what comes or goes meanwhile may be missing, or be there twice. A
// record's Duration is the connection's age, and it has no Reason yet.
func (t *Tunnel) Connections(ctx context.Context) (list []telemetry.Connection, total int) {
	var mu sync.Mutex // guards list and total
	var wait sync.WaitGroup
	now := time.Now()
	for _, w := range t.workers {
		wait.Add(1)
		l := &listing{done: wait.Done, take: func(c *telemetry.Connection) {
			mu.Lock()
			defer mu.Unlock()
			if total++; len(list) < MaxListed {
				c.Duration = now.Sub(c.Start)
				list = append(list, *c)
			}
		}}
		if !w.Loop.Post(func() { w.list(l) }) {
			wait.Done()
		}
	}
	all := make(chan struct{})
	go func() { defer close(all); wait.Wait() }()
	select {
	case <-all:
	case <-ctx.Done():
	case <-t.ctx.Done():
	}
	mu.Lock()
	defer mu.Unlock()
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(a, b telemetry.Connection) int { return a.Start.Compare(b.Start) })
	return list, total
}

// list begins a walk.
func (w *worker) list(l *listing) {
	if w.lives.listings == nil {
		w.lives.listings = map[*listing]struct{}{}
	}
	l.cursor = w.lives.head
	w.lives.listings[l] = struct{}{}
	w.tell(l)
}

// tell is one turn's share of a walk.
func (w *worker) tell(l *listing) {
	for range recheckShare {
		at := l.cursor
		if at == nil {
			delete(w.lives.listings, l)
			l.done()
			return
		}
		l.cursor = at.next
		l.take(at.conn.seen())
	}
	w.Loop.After(0, func() { w.tell(l) })
}

// seen is the record of a connection that goes on.
func (o *outbound) seen() *telemetry.Connection {
	c := o.record()
	if o.relay != nil {
		c.FromClient, c.ToClient = o.relay.Sent(), o.relay.Received()
	}
	return c
}

// seen is the record of a connection that goes on.
func (i *inbound) seen() *telemetry.Connection {
	c := i.record()
	if i.relay != nil {
		c.FromClient, c.ToClient = i.relay.Received(), i.relay.Sent()
	}
	return c
}
