// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net/netip"
	"sync"
)

// handshakeCPUs is the part of the processors that compute handshakes, of which each
// has a loop: a half, one at least. A flood of them is not to have those that carry
// bytes wait.
const handshakeCPUs = 2

// turns shares out what handshakes compute, up to so many at once. Who waits is
// served by address in turn, each address in its own order: a flood of one's does
// not delay another's.
type turns struct {
	mu      sync.Mutex // guards what follows
	free    int
	waiting map[netip.Addr][]chan struct{}
	order   []netip.Addr // that have somebody waiting
}

// newTurns is for so many processors.
func newTurns(cpus int) *turns {
	return &turns{free: max(1, cpus/handshakeCPUs), waiting: map[netip.Addr][]chan struct{}{}}
}

// of is an address's way to its turns.
func (t *turns) of(a netip.Addr) *turn { return &turn{t, a} }

// turn is a sync.Locker for one handshake of an address.
type turn struct {
	t    *turns
	addr netip.Addr
}

// Lock waits for a turn.
func (u *turn) Lock() {
	t := u.t
	t.mu.Lock()
	if t.free > 0 {
		t.free--
		t.mu.Unlock()
		return
	}
	c := make(chan struct{})
	if len(t.waiting[u.addr]) == 0 {
		t.order = append(t.order, u.addr)
	}
	t.waiting[u.addr] = append(t.waiting[u.addr], c)
	t.mu.Unlock()
	<-c
}

// Unlock gives the turn to the next address.
func (u *turn) Unlock() {
	t := u.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.order) == 0 {
		t.free++
		return
	}
	a := t.order[0]
	t.order = t.order[1:]
	queue := t.waiting[a]
	close(queue[0])
	if len(queue) == 1 {
		delete(t.waiting, a)
		return
	}
	t.waiting[a] = queue[1:]
	t.order = append(t.order, a)
}
