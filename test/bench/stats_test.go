// SPDX-License-Identifier: Apache-2.0

package main

import "testing"

// The ranks are those of the tables of the sign test's intervals.
func TestSummarise(t *testing.T) {
	for _, c := range []struct {
		n                 int
		median, low, high float64
	}{
		{1, 1, 1, 1}, {2, 1.5, 1, 2}, {5, 3, 1, 5}, {6, 3.5, 1, 6}, {8, 4.5, 1, 8},
		{9, 5, 2, 8}, {12, 6.5, 3, 10}, {20, 10.5, 6, 15},
	} {
		var values []float64
		for i := range c.n {
			values = append(values, float64(c.n-i)) // not in order
		}
		if got := summarise(values); got != (estimate{c.median, c.low, c.high}) {
			t.Errorf("%d values: %v, want %v of %v to %v", c.n, got, c.median, c.low, c.high)
		}
	}
}
