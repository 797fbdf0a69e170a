// SPDX-License-Identifier: Apache-2.0

package session_test

import (
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/culvert-mesh/culvert/tunnel/session"
)

// firstSeed is random, or what CULVERT_SEED says.
func firstSeed(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("CULVERT_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("first seed %d: repeat with CULVERT_SEED=%[1]d", seed)
	return seed
}

// A session is frozen and thawed at a thousand random points of its life, in
// whatever it is in the middle of, and no byte of any stream is lost, doubled or
// changed.
func TestFreezeAnywhere(t *testing.T) {
	const worlds, steps, freezes = 25, 2000, 40
	seed := firstSeed(t)
	seen := map[string]int{}
	total, updates, whole, came := 0, 0, 0, 0
	for i := range uint64(worlds) {
		w := newWorld(seed + i)
		if err := w.run(steps, freezes); err != nil {
			t.Fatalf("seed %d: after %d freezes: %v", w.seed, w.freezes, err)
		}
		total += w.freezes
		updates += w.updates
		whole += w.whole
		came += w.bytes
		for what, n := range w.seen {
			seen[what] += n
		}
	}
	t.Logf("%d freezes, %d KeyUpdates, %d directions whole, %d bytes, in the middle of: %v", total, updates, whole, came, seen)
	if total < 1000 || updates < 100 || whole < 500 || came < 20<<20 {
		t.Error("too little happened to tell")
	}
	for _, what := range []string{
		"a record", "unsent bytes", "a frame's header", "DATA", "another frame", "a CONTINUATION frame", "a header block",
		"control frames", "the first SETTINGS", "a KeyUpdate that is owed", "a KeyUpdate that is awaited",
		"queued bytes", "an exhausted window", "a full receive window", "a half-closed stream", "a closed stream with bytes left",
	} {
		if seen[what] == 0 {
			t.Errorf("never frozen with %s", what)
		}
	}
}

// The control: whatever a take-over would lose, double or change is noticed.
func TestSpoiltFreezeIsNoticed(t *testing.T) {
	seed := firstSeed(t)
	drop := func(b *[]byte) bool {
		if len(*b) == 0 {
			return false
		}
		i := len(*b) / 2
		*b = slices.Delete(slices.Clone(*b), i, i+1)
		return true
	}
	queue := func(st *session.State, spoil func(*[]byte) bool) bool {
		for i := range st.H2.Streams {
			if s := &st.H2.Streams[i]; len(s.Queue) > 1 && !s.Closed {
				return spoil(&s.Queue)
			}
		}
		return false
	}
	for name, spoil := range map[string]func(*session.State) bool{
		"nothing":                      func(*session.State) bool { return true },
		"a byte of the partial record": func(st *session.State) bool { return drop(&st.Partial) },
		"a byte of what is unsent":     func(st *session.State) bool { return drop(&st.Unsent) },
		"what is unsent":               func(st *session.State) bool { n := len(st.Unsent); st.Unsent = nil; return n > 0 },
		"a byte of a queue":            func(st *session.State) bool { return queue(st, drop) },
		"a byte of the control frames": func(st *session.State) bool { return drop(&st.H2.Control) },
		"a byte of a frame":            func(st *session.State) bool { return drop(&st.H2.Gather) },
		"a byte of a header block":     func(st *session.State) bool { return drop(&st.H2.Block) },
		"where a frame ends": func(st *session.State) bool {
			if st.H2.Left == 0 || st.H2.Current == 0 {
				return false
			}
			st.H2.Left--
			return true
		},
		"a record's number":       func(st *session.State) bool { st.Records.Read.Sequence++; return true },
		"what is unsent, doubled": func(st *session.State) bool { st.Unsent = append(st.Unsent, st.Unsent...); return len(st.Unsent) > 0 },
		"the partial record, doubled": func(st *session.State) bool {
			st.Partial = append(st.Partial, st.Partial...)
			return len(st.Partial) > 0
		},
		"a queue, doubled": func(st *session.State) bool {
			return queue(st, func(b *[]byte) bool { *b = append(*b, *b...); return true })
		},
		"a changed byte of a queue": func(st *session.State) bool {
			return queue(st, func(b *[]byte) bool { (*b)[0] ^= 1; return true })
		},
	} {
		t.Run(name, func(t *testing.T) {
			for i := range uint64(20) {
				w := newWorld(seed + i)
				w.spoil, w.calm = spoil, true
				err := w.run(1500, 40)
				if !w.spoilt {
					continue // there was nothing to spoil: another world
				}
				if (err == nil) != (name == "nothing") {
					t.Errorf("seed %d: the outcome is: %v", w.seed, err)
				}
				t.Log(err)
				return
			}
			t.Error("there was never anything to spoil")
		})
	}
}
