// SPDX-License-Identifier: Apache-2.0

package daemon

import "runtime"

// processors returns how many loops there are to be: those that are configured, or
// one for each processor that the process may use, by its cgroup's limit, too. Go
// may run one thread more than that until undo. A loop that wakes otherwise finds
// that handshakes, or the collector, have its place, and gets it back when they wait
// for something, or after 10 ms: so long is a turn of Go's scheduler. The kernel's
// lets it run at once.
func processors(loops int) (n int, undo func()) {
	before := runtime.GOMAXPROCS(0)
	if loops == 0 {
		loops = before
	}
	runtime.GOMAXPROCS(max(before, loops+1))
	return loops, func() { runtime.GOMAXPROCS(before) }
}
