// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"slices"
)

// estimate is a median with an interval that holds the true one in at least 95 of
// 100 cases, by the order of the values and without an assumption about them.
// Below six values that is more than all of them can say: it is their range.
type estimate struct{ median, low, high float64 }

func summarise(values []float64) estimate {
	s := slices.Sorted(slices.Values(values))
	n := len(s)
	if n == 0 {
		return estimate{math.NaN(), math.NaN(), math.NaN()}
	}
	m := s[n/2]
	if n%2 == 0 {
		m = (s[n/2-1] + s[n/2]) / 2
	}
	// The true median is below the k-th value with the chance of fewer than k
	// heads in n throws of a coin.
	k, tail, p := 0, 0.0, math.Pow(0.5, float64(n))
	for i := 0; i < n/2; i++ {
		tail += p
		if 2*tail > 0.05 {
			break
		}
		k = i + 1
		p = p * float64(n-i) / float64(i+1)
	}
	k = max(k, 1)
	return estimate{m, s[k-1], s[n-k]}
}
