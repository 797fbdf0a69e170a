// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"runtime"
	"testing"
)

// There is a thread for each loop and one for what is none, for as long as it is asked for.
func TestProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	for _, c := range []struct{ loops, want, threads int }{
		{0, before, before + 1},
		{1, 1, max(before, 2)},
		{before + 4, before + 4, before + 5},
	} {
		n, undo := processors(c.loops)
		if threads := runtime.GOMAXPROCS(0); n != c.want || threads != c.threads {
			t.Errorf("%d loops: %d on %d threads, want %d on %d", c.loops, n, threads, c.want, c.threads)
		}
		undo()
		if after := runtime.GOMAXPROCS(0); after != before {
			t.Fatalf("%d threads afterwards, %d before", after, before)
		}
	}
}
