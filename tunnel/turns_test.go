// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"slices"
	"testing"
	"testing/synctest"
)

// Half of the processors, and one of one.
func TestTurnsOfProcessors(t *testing.T) {
	for cpus, want := range map[int]int{1: 1, handshakeCPUs: 1, handshakeCPUs + 1: 1, 2 * handshakeCPUs: 2, 64: 64 / handshakeCPUs} {
		if n := newTurns(cpus).free; n != want {
			t.Errorf("%d processors: %d at once, want %d", cpus, n, want)
		}
	}
}

// So many at once, and one above it waits; who waits is served by address in turn,
// each in its own order.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 2
		turns := newTurns(n * handshakeCPUs)
		flood, one, other := turns.of(address(0)), turns.of(address(1)), turns.of(address(2))
		for range n {
			flood.Lock()
		}
		var served []string
		wait := func(name string, u *turn) {
			go func() {
				u.Lock()
				served = append(served, name)
			}()
			synctest.Wait()
		}
		for _, name := range []string{"f1", "f2", "f3", "f4"} {
			wait(name, flood)
		}
		wait("one", one)
		wait("other", other)
		wait("one again", one)
		if len(served) > 0 {
			t.Fatalf("%v did not wait", served)
		}
		for range 7 {
			flood.Unlock()
			synctest.Wait()
		}
		want := []string{"f1", "one", "other", "f2", "one again", "f3", "f4"}
		if !slices.Equal(served, want) {
			t.Errorf("served %v, want %v", served, want)
		}
		for range n {
			flood.Unlock()
		}
		if turns.free != n || len(turns.order) != 0 || len(turns.waiting) != 0 {
			t.Errorf("%d are free, %v and %v wait", turns.free, turns.order, turns.waiting)
		}
	})
}
