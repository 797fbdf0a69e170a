// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"container/list"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvert-mesh/culvert/policy"
)

// maxRefusals is how many refusals are kept, some 600 bytes each.
const maxRefusals = 256

// Refusals keeps the connections that were refused last, or ended by the tunnel,
// for who asks why. Those that are alike are one, with their number: a client that
// tries in a loop takes the place of nobody else's. Its methods are safe for
// concurrent use, and its zero value is ready.
type Refusals struct {
	mu    sync.Mutex // guards what follows
	total uint64
	known map[refusalKey]*list.Element
	last  list.List // of *Refusal, the latest in front
}

// Refusal is a connection that was refused, and how often one like it was.
type Refusal struct {
	Connection           // the latest; Detail is cut as in the access log
	Last       time.Time // when that was
	Times      uint64
}

// refusalKey is what makes two of them alike: the source's port is not in it.
type refusalKey struct {
	direction policy.Direction
	src       netip.Addr
	dst       netip.AddrPort
	reason    Reason
	rule      string
}

// Record takes note of a connection that has ended, if it was refused: for any
// reason but ok and reset, which is what applications do. It copies c.
func (r *Refusals) Record(c *Connection) {
	if c.Reason == ReasonOK || c.Reason == ReasonReset {
		return
	}
	k := refusalKey{c.Direction, c.Src.Addr.Addr(), c.Dst.Addr, c.Reason, c.Rule}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.total++
	e := r.known[k]
	if e == nil {
		e = r.add(k)
	}
	f := e.Value.(*Refusal)
	f.Connection, f.Last = *c, c.Start.Add(c.Duration)
	f.Detail = cut(c.Detail)
	f.Times++
	r.last.MoveToFront(e)
}

// add makes room for one more. The caller holds mu.
func (r *Refusals) add(k refusalKey) *list.Element {
	if r.known == nil {
		r.known = map[refusalKey]*list.Element{}
	}
	var e *list.Element
	if r.last.Len() < maxRefusals {
		e = r.last.PushFront(&Refusal{})
	} else {
		e = r.last.Back()
		f := e.Value.(*Refusal)
		delete(r.known, refusalKey{f.Direction, f.Src.Addr.Addr(), f.Dst.Addr, f.Reason, f.Rule})
		*f = Refusal{}
	}
	r.known[k] = e
	return e
}

// List returns those that are kept, the latest first, and how many connections
// were refused in all.
func (r *Refusals) List() (kept []Refusal, total uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for e := r.last.Front(); e != nil; e = e.Next() {
		kept = append(kept, *e.Value.(*Refusal))
	}
	// What the kernel refuses is told some time after.
	slices.SortStableFunc(kept, func(a, b Refusal) int { return b.Last.Compare(a.Last) })
	return kept, r.total
}
