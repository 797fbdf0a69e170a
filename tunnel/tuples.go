// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net/netip"
	"sync"
	"sync/atomic"
)

// tuple is a live plaintext connection that ends in a pod.
type tuple struct{ client, local netip.AddrPort }

// tuples are a pod's live plaintext connections: those let in and those from
// before the enrolment. A delivery of the same client's to the same port of the
// application must not have one's four-tuple: its SYN would be that socket's, and
// not the listener's, and go unanswered. The kernel does not see the conflict,
// since neither end of the delivery is bound to the other's port.
//
// It is as large as there are such connections. One that is forgotten costs a
// port that is never chosen.
type tuples struct {
	n    atomic.Int64 // entries: without any, a delivery takes no lock
	mu   sync.Mutex   // guards held
	held map[tuple]int
}

func (s *tuples) hold(t tuple) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = map[tuple]int{}
	}
	s.held[t]++
	s.n.Store(int64(len(s.held)))
}

func (s *tuples) drop(t tuple) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[t] > 1 {
		s.held[t]--
	} else {
		delete(s.held, t)
	}
	s.n.Store(int64(len(s.held)))
}

// avoid returns what a delivery's port may not be, or nil where it may be any.
func (s *tuples) avoid(client netip.Addr, local netip.AddrPort) func(port uint16) bool {
	if s.n.Load() == 0 {
		return nil
	}
	return func(port uint16) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.held[tuple{netip.AddrPortFrom(client, port), local}] > 0
	}
}

// HoldTuple keeps deliveries clear of a live plaintext connection of a client to
// the pod, until DropTuple is called as often. Addresses are plain ones, not
// v4-mapped. Both may be called from any goroutine.
func (p *Pod) HoldTuple(client, local netip.AddrPort) { p.tuples.hold(tuple{client, local}) }

// DropTuple takes back one HoldTuple.
func (p *Pod) DropTuple(client, local netip.AddrPort) { p.tuples.drop(tuple{client, local}) }
