// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"container/heap"
	"time"
)

// Timer is one call in the future on the loop's thread. The zero value is not
// usable: Loop.After makes them.
type Timer struct {
	at    time.Time
	f     func()
	index int // in the heap, -1 when not in it
	owner *timers
}

// After calls f on the loop's thread after d, unless the timer is stopped.
func (l *Loop) After(d time.Duration, f func()) *Timer {
	t := &Timer{at: time.Now().Add(d), f: f, owner: &l.timers}
	heap.Push(&l.timers, t)
	return t
}

// Stop keeps a timer from being called. It may be called on a nil timer, on
// one that has fired, and more than once.
func (t *Timer) Stop() {
	if t == nil || t.index < 0 {
		return
	}
	heap.Remove(t.owner, t.index)
}

type timers []*Timer

func (h timers) Len() int           { return len(h) }
func (h timers) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h timers) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push is container/heap's.
func (h *timers) Push(x any) {
	t := x.(*Timer)
	t.index = len(*h)
	*h = append(*h, t)
}

// Pop is container/heap's.
func (h *timers) Pop() any {
	n := len(*h) - 1
	t := (*h)[n]
	(*h)[n] = nil
	*h = (*h)[:n]
	t.index = -1
	return t
}

func (h *timers) next() (time.Time, bool) {
	if len(*h) == 0 {
		return time.Time{}, false
	}
	return (*h)[0].at, true
}

func (h *timers) run(now time.Time) {
	for len(*h) > 0 && !(*h)[0].at.After(now) {
		t := heap.Pop(h).(*Timer)
		t.f()
	}
}
