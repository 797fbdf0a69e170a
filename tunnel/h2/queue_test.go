// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// What the meter is told is what the queues hold, whatever is done to them, and
// 0 in the end.
func TestMeter(t *testing.T) {
	const seed = 1
	r := rand.New(rand.NewPCG(seed, seed))
	_, s, _, ss := tunnelled(t, Config{})
	var metered int
	s.Meter(func(n int) { metered += n })
	var want []byte
	for i := range 5000 {
		if r.IntN(2) == 0 {
			p := bytes.Repeat([]byte{byte(i)}, r.IntN(20<<10))
			ss.Enqueue(p)
			want = append(want, p...)
		} else {
			n := r.IntN(30 << 10)
			ss.Dequeue(n)
			want = want[min(n, len(want)):]
		}
		if metered != ss.QueueMemory() || metered < len(want) {
			t.Fatalf("step %d: the meter says %d, the queue holds %d for %d bytes", i, metered, ss.QueueMemory(), len(want))
		}
		if i%50 == 0 && !bytes.Equal(bytes.Join(ss.Queued(), nil), want) {
			t.Fatalf("step %d: the queue is not what was put in", i)
		}
	}
	ss.Enqueue([]byte("x"))
	s.Reset(ss, 0)
	if metered != 0 {
		t.Fatalf("the meter says %d after the reset", metered)
	}
	if n := len(s.scratch.chunks); n == 0 || n > keepChunks {
		t.Fatalf("%d chunks are kept, want 1 to %d", n, keepChunks)
	}
}

// A meter that comes late is told of what there is, and a connection's end gives
// everything back, also what came before a reset of the peer's.
func TestMeterFromNowOn(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	ss.Enqueue(make([]byte, 1000))
	metered := 0
	s.Meter(func(n int) { metered += n })
	if metered != ss.QueueMemory() {
		t.Fatalf("the meter says %d, want %d", metered, ss.QueueMemory())
	}
	_ = c
	receive(t, s, appendReset(nil, cs.id, 0))
	if metered == 0 {
		t.Fatal("what came before the reset is gone")
	}
	s.Reset(ss, 0)
	if metered != 0 {
		t.Fatalf("the meter says %d after the reset", metered)
	}
}

// BenchmarkQueue is an application that is a little slower than its peer: 64 KiB
// are queued and taken, in pieces of a record.
func BenchmarkQueue(b *testing.B) {
	c := New(Config{})
	s := c.newStream(1)
	p := make([]byte, 16375)
	b.SetBytes(4 * int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		for range 4 {
			s.Enqueue(p)
		}
		for s.QueuedBytes() > 0 {
			s.Dequeue(len(s.Queued()[0]))
		}
	}
}
