// SPDX-License-Identifier: Apache-2.0

package socket

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
)

const (
	// maxStocked bounds the delivery sockets in stock on a node: descriptors
	// are finite.
	maxStocked = 2048
	// maxStock bounds one pod's stock of one family.
	maxStock = 64
	// shrinkEvery is how often an unused stock is halved, down to nothing.
	shrinkEvery = 10 * time.Second
)

// budget counts what may be in stock on the node.
type budget struct {
	mu    sync.Mutex
	used  int
	limit int
}

func (b *budget) take() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used >= b.limit {
		return false
	}
	b.used++
	return true
}

func (b *budget) give() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used--
}

// Stock keeps delivery sockets for one pod: none while it is idle, more as
// they are taken.
type Stock struct {
	m    *Maker
	ns   *netns.NS
	kick chan struct{}
	stop chan struct{}
	done chan struct{}

	mu       sync.Mutex // guards the fields below
	families [2]shelf
	closed   bool
}

// shelf is a stock of one family.
type shelf struct {
	fds     []int
	target  int // how many there are to be
	taken   int // since the last shrinking
	waiting []func(fd int, err error)
}

// Stock opens a stock for a pod, empty.
func (m *Maker) Stock(ns *netns.NS) *Stock {
	s := &Stock{m: m, ns: ns, kick: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	go s.run()
	return s
}

func index(v6 bool) int {
	if v6 {
		return 1
	}
	return 0
}

// Take returns a socket from stock, or false when there is none. It never
// waits, and has the stock filled up.
func (s *Stock) Take(v6 bool) (fd int, ok bool) {
	s.mu.Lock()
	f := &s.families[index(v6)]
	f.taken++
	n := len(f.fds)
	if n > 0 {
		fd, ok = f.fds[n-1], true
		f.fds = f.fds[:n-1]
		s.m.stocked.give()
	}
	if n <= f.target/2 {
		if n == 0 {
			f.target = min(maxStock, max(4, 2*f.target)) // it was too small
		}
		s.wake()
	}
	s.mu.Unlock()
	return fd, ok
}

// Wait calls got, on another goroutine, with a socket as soon as there is one.
func (s *Stock) Wait(v6 bool, got func(fd int, err error)) {
	s.mu.Lock()
	closed := s.closed
	if !closed {
		f := &s.families[index(v6)]
		f.waiting = append(f.waiting, got)
		s.wake()
	}
	s.mu.Unlock()
	if closed {
		go got(-1, ErrClosed)
	}
}

func (s *Stock) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// Close closes the sockets in stock; who waits is told. The Maker's thread
// leaves the namespace, which may end then. Idempotent.
func (s *Stock) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.stop)
	}
	s.mu.Unlock()
	<-s.done
	if err := s.m.in(nil, func() error { return nil }); err != nil && !errors.Is(err, ErrClosed) {
		return err
	}
	return nil
}

func (s *Stock) run() {
	defer close(s.done)
	defer s.empty()
	shrink := time.NewTicker(shrinkEvery)
	defer shrink.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-shrink.C:
			s.shrink()
		case <-s.kick:
			s.fill(false)
			s.fill(true)
		}
	}
}

// fill makes what is wanted: first for those who wait, then for the shelf. One
// job makes several, so that the namespace is entered once.
func (s *Stock) fill(v6 bool) {
	f := &s.families[index(v6)]
	const batch = 16
	for {
		s.mu.Lock()
		waiting := f.waiting
		f.waiting = nil
		want := 0
		if !s.closed {
			want = f.target - len(f.fds)
		}
		s.mu.Unlock()
		if len(waiting) == 0 && want <= 0 {
			return
		}
		n := len(waiting)
		if n == 0 {
			n = min(want, batch)
		}
		var fds []int
		err := s.m.in(s.ns, func() error {
			for range n {
				fd, err := s.m.delivery(v6)
				if err != nil {
					return err
				}
				fds = append(fds, fd)
			}
			return nil
		})
		for _, got := range waiting {
			if len(fds) > 0 {
				got(fds[0], nil)
				fds = fds[1:]
			} else {
				got(-1, fmt.Errorf("make delivery socket: %w", err))
			}
		}
		if !s.shelve(f, fds) || err != nil {
			return
		}
	}
}

// shelve puts sockets in stock, as far as the node's budget goes.
func (s *Stock) shelve(f *shelf, fds []int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, fd := range fds {
		if s.closed || !s.m.stocked.take() {
			for _, fd := range fds[i:] {
				unix.Close(fd)
			}
			f.target = len(f.fds)
			return false
		}
		f.fds = append(f.fds, fd)
	}
	return true
}

// shrink halves a stock that was not used.
func (s *Stock) shrink() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.families {
		f := &s.families[i]
		if f.taken == 0 {
			f.target /= 2
		}
		f.taken = 0
		for len(f.fds) > f.target {
			n := len(f.fds) - 1
			unix.Close(f.fds[n])
			f.fds = f.fds[:n]
			s.m.stocked.give()
		}
	}
}

func (s *Stock) empty() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.families {
		f := &s.families[i]
		for _, fd := range f.fds {
			unix.Close(fd)
			s.m.stocked.give()
		}
		f.fds = nil
		for _, got := range f.waiting {
			go got(-1, ErrClosed)
		}
		f.waiting = nil
	}
}
