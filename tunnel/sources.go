// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/culvert-mesh/culvert/tunnel/relay"
)

const (
	// maxHandshakes is how many handshakes of peers run at once on a node; what
	// is beyond is reset and counted, so that half-open ones cannot fill the
	// memory.
	maxHandshakes = 512

	// maxSourceHandshakes is how many of them may be one address's. A client
	// that calls every pod of a node at once, of which Kubernetes has 110 by
	// default, is not to be refused; and four are needed to lock others out.
	maxSourceHandshakes = 128

	// plainPart is the part that one address may have of the connections in
	// plaintext that a node lets in. Their clients are strangers: four are needed
	// to lock others out.
	plainPart = 4
)

// sources is what each address of a peer has a node do.
type sources struct {
	budget *relay.Budget
	limits *limits

	mostPlain int // connections in plaintext

	mu    sync.Mutex // guards what follows
	all   int        // handshakes that run
	plain int        // connections in plaintext that are open
	known map[netip.Addr]*source
}

// source is one address of a peer. It is there while anything refers to it.
type source struct {
	addr       netip.Addr
	account    *relay.Account
	refs       int
	handshakes int // that run
	plain      int // connections in plaintext that are open
}

func newSources(b *relay.Budget, l *limits, mostPlain int) *sources {
	return &sources{budget: b, limits: l, mostPlain: mostPlain, known: map[netip.Addr]*source{}}
}

// take refers to an address. drop ends that.
func (s *sources) take(a netip.Addr) *source {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ref(a)
}

func (s *sources) ref(a netip.Addr) *source {
	src := s.known[a]
	if src == nil {
		src = &source{addr: a, account: s.budget.Account()}
		s.known[a] = src
	}
	src.refs++
	return src
}

func (s *sources) drop(src *source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unref(src)
}

func (s *sources) unref(src *source) {
	if src.refs--; src.refs == 0 {
		delete(s.known, src.addr)
	}
}

// greet begins a handshake of an address, and charges it for the session that
// may come of it. After it come greeted, and part or drop.
func (s *sources) greet(a netip.Addr) (*source, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.ref(a)
	var err error
	switch {
	case s.all >= maxHandshakes:
		s.limits.handshakes.Add(1)
		err = fmt.Errorf("%d handshakes are running already", maxHandshakes)
	case src.handshakes >= maxSourceHandshakes:
		s.limits.sourceHandshakes.Add(1)
		err = fmt.Errorf("%d handshakes of this address are running already", maxSourceHandshakes)
	case !src.account.Open(relay.SessionCost):
		s.limits.sessions.Add(1)
		err = fmt.Errorf("this address holds as many sessions and streams open as it may")
	default:
		s.all++
		src.handshakes++
		return src, nil
	}
	s.unref(src)
	return nil, err
}

// greeted ends a handshake.
func (s *sources) greeted(src *source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	src.handshakes--
}

// part gives back what greet took, when the session has ended or has not come
// about.
func (s *sources) part(src *source) {
	src.account.Close(relay.SessionCost)
	s.drop(src)
}

// enter counts a connection in plaintext of an address in. After it comes leave.
func (s *sources) enter(a netip.Addr) (*source, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.ref(a)
	var err error
	switch part := max(1, s.mostPlain/plainPart); {
	case s.plain >= s.mostPlain:
		err = fmt.Errorf("%d connections in plaintext are open on this node: half of its descriptors", s.mostPlain)
	case src.plain >= part:
		err = fmt.Errorf("%d connections in plaintext of this address are open: one may have a quarter of the node's", part)
	default:
		s.plain++
		src.plain++
		return src, nil
	}
	s.unref(src)
	return nil, err
}

// leave counts it out.
func (s *sources) leave(src *source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.plain--
	src.plain--
	s.unref(src)
}

// limits counts what was refused or ended for a bound on peers.
type limits struct {
	handshakes, sourceHandshakes, sessions, streams, queued, calm, unread, paused, descriptors atomic.Uint64
}

// Limits has the names of the bounds that are counted, with how often each was
// met.
func (t *Tunnel) Limits() map[string]uint64 {
	l := &t.limits
	return map[string]uint64{
		"handshakes":        l.handshakes.Load(),
		"source_handshakes": l.sourceHandshakes.Load(),
		"sessions":          l.sessions.Load(),
		"streams":           l.streams.Load(),
		"queued":            l.queued.Load(),
		"calm":              l.calm.Load(),
		"unread":            l.unread.Load(),
		"paused":            l.paused.Load(),
		"descriptors":       l.descriptors.Load(),
	}
}

// Memory is how many bytes are queued for applications, how many sessions and
// streams of peers are charged at, and what both may be together.
func (t *Tunnel) Memory() (queued, open, size int64) {
	return t.budget.Queued(), t.budget.Open(), t.budget.Size()
}
