// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"testing"

	"github.com/culvert-mesh/culvert/redirect"
)

// BenchmarkEnrol is what the kernel's part of a pod costs to set up and to take
// away: programs, maps, rules, routes and sysctls, without the listeners.
func BenchmarkEnrol(b *testing.B) {
	w := newWorld(b)
	node, err := redirect.Open(w.cfg)
	if err != nil {
		b.Fatal(err)
	}
	w.node = node
	b.ReportAllocs()
	for b.Loop() {
		p, err := node.AddPod(b.Context(), w.podConfig())
		w.must(err)
		w.must(p.Enrol())
		w.must(p.Release())
	}
}
