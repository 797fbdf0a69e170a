// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// result is what an attacker has seen.
type result struct {
	Seconds     float64          // that it took
	Connections int64            // TCP
	Sessions    int64            // handshakes that ended
	Frames      int64            // or whatever the kind counts: written without an error
	Bytes       int64            // written
	Answers     map[string]int64 // frames and statuses that came
	Ends        map[string]int64 // how connections ended
	Held        int64            // connections that were open at the end
}

func (r *result) add(x result) {
	r.Seconds += x.Seconds
	r.Connections += x.Connections
	r.Sessions += x.Sessions
	r.Frames += x.Frames
	r.Bytes += x.Bytes
	r.Held += x.Held
	for k, v := range x.Answers {
		r.Answers[k] += v
	}
	for k, v := range x.Ends {
		r.Ends[k] += v
	}
}

// rate is how many frames were sent in a second, connections where there are none.
func (r result) rate() float64 {
	n := r.Frames
	if n == 0 {
		n = r.Connections
	}
	return float64(n) / max(r.Seconds, 1e-9)
}

func (r result) String() string {
	say := func(m map[string]int64) string {
		var out []string
		for _, k := range slices.Sorted(maps.Keys(m)) {
			out = append(out, fmt.Sprintf("%s %d", k, m[k]))
		}
		return strings.Join(out, ", ")
	}
	return fmt.Sprintf("%.0f a second: %d connections, %d sessions, %d frames, %.1f MB; answers: %s; ends: %s; held: %d",
		r.rate(), r.Connections, r.Sessions, r.Frames, float64(r.Bytes)/1e6, say(r.Answers), say(r.Ends), r.Held)
}
