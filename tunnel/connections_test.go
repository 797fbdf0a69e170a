// SPDX-License-Identifier: Apache-2.0

package tunnel

import "testing"

// A walk visits each connection once, in bounded turns, also while connections
// end, the one that would be next among them, and beside another walk.
func TestWalkVisitsEachOnce(t *testing.T) {
	const many = 3*recheckShare + 7
	conns := make([]*asked, many)
	counts := [2]int{}
	ended := make(chan struct{}, len(counts))
	onLoop(t, func(w *worker) {
		for i := range conns {
			conns[i] = &asked{}
			conns[i].live.conn = conns[i]
			w.link(&conns[i].live)
		}
		// The newest comes first: the one after it is next, and ends.
		conns[many-5].telling = func() { conns[many-6].live.unlink() }
		for i := range counts {
			w.walk(&walk{visit: func(l liveConnection) { l.seen(); counts[i]++ }, done: func() { ended <- struct{}{} }})
		}
		if counts[0] > recheckShare {
			t.Errorf("%d in one turn", counts[0])
		}
	})
	if len(ended) != len(counts) {
		t.Errorf("%d walks have said that they are over, of %d", len(ended), len(counts))
	}
	for i, c := range conns {
		want := 2
		if i == many-6 {
			want = 0
		}
		if c.told != want {
			t.Fatalf("connection %d was told of %d times, want %d", i, c.told, want)
		}
	}
	if counts != [2]int{many - 1, many - 1} {
		t.Errorf("told of %v", counts)
	}
}
