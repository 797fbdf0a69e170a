// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"testing"
)

// dataTurn is one side receiving DATA as a record carries it, and taking it.
func dataTurn(t testing.TB, payload int) (turn func()) {
	c, s, cs, _ := tunnelled(t, Config{Client: true}, Config{})
	p := make([]byte, FrameHeaderLen+payload)
	hdr := make([]byte, FrameHeaderLen)
	return func() {
		if cs.Sendable() < payload {
			t.Fatalf("stalled: %d bytes may be sent", cs.Sendable())
		}
		c.PutData(hdr, cs, payload, false)
		copy(p, hdr)
		events, err := s.Receive(p)
		if err != nil || len(events) != 1 || len(events[0].Data) != payload {
			t.Fatalf("%d events, %v", len(events), err)
		}
		s.Taken(events[0].Stream, payload)
		if u := s.Control(); len(u) > 0 {
			if _, err := c.Receive(u); err != nil {
				t.Fatal(err)
			}
			s.ConsumeControl(len(u))
		}
	}
}

func TestDataDoesNotAllocate(t *testing.T) {
	for _, payload := range []int{1, 64, 16384 - FrameHeaderLen} {
		turn := dataTurn(t, payload)
		for range 100 {
			turn()
		}
		if n := testing.AllocsPerRun(2000, turn); n != 0 {
			t.Errorf("%d bytes: %v allocations per frame, want none", payload, n)
		}
	}
}

func benchmarkData(b *testing.B, payload int) {
	turn := dataTurn(b, payload)
	b.SetBytes(int64(payload))
	b.ReportAllocs()
	for b.Loop() {
		turn()
	}
}

func BenchmarkData64(b *testing.B)   { benchmarkData(b, 64) }
func BenchmarkDataFull(b *testing.B) { benchmarkData(b, 16384-FrameHeaderLen) }

func BenchmarkOpenAnswerClose(b *testing.B) {
	c, s := pair(b, Config{Client: true}, Config{})
	request, answer := connectFields(), okFields()
	give := func(from, to *Conn) []Event {
		events := receive(b, to, from.Control())
		from.ConsumeControl(len(from.Control()))
		return events
	}
	b.ReportAllocs()
	for b.Loop() {
		cs, err := c.Open(request, nil)
		if err != nil {
			b.Fatal(err)
		}
		ss := give(c, s)[0].Stream
		if err := s.Respond(ss, answer, false); err != nil {
			b.Fatal(err)
		}
		give(s, c)
		c.End(cs)
		give(c, s)
		s.End(ss)
		give(s, c)
		if !cs.Closed() || !ss.Closed() {
			b.Fatal("not closed")
		}
	}
}
