// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"testing"

	"golang.org/x/net/http2"
)

// maxRecordData is the data of a DATA frame that fills a TLS record.
const maxRecordData = 16384 - FrameHeaderLen

// steady is a server with an established stream, and a DATA frame for it.
func steady(t testing.TB, size int) (s *Conn, ss *Stream, frame []byte) {
	t.Helper()
	_, s, cs, ss := tunnelled(t, Config{})
	s.SetWindow(ss, 4<<20)
	take(s)
	frame = append(appendFrameHeader(nil, size, http2.FrameData, 0, cs.ID()), make([]byte, size)...)
	return s, ss, frame
}

// receiveOnce is what the hot path does for a record with one frame.
func receiveOnce(t testing.TB, s *Conn, frame []byte) {
	events, err := s.Receive(frame)
	if err != nil {
		t.Fatal(err)
	}
	for i := range events {
		s.Taken(events[i].Stream, len(events[i].Data))
	}
	if n := len(s.Control()); n > 0 {
		s.ConsumeControl(n)
	}
}

// Nothing is allocated for DATA in either direction, whole or split, nor for
// the window updates that go with it.
func TestDataDoesNotAllocate(t *testing.T) {
	s, ss, frame := steady(t, maxRecordData)
	split := func(p []byte) {
		receiveOnce(t, s, p[:5])
		receiveOnce(t, s, p[5:1000])
		receiveOnce(t, s, p[1000:])
	}
	update := appendWindowUpdate(nil, ss.id, 1)
	s.updates = 2000 // as if DATA had been sent
	var hdr [FrameHeaderLen]byte
	for name, f := range map[string]func(){
		"receive":       func() { receiveOnce(t, s, frame) },
		"receive split": func() { split(frame) },
		"window update": func() { receiveOnce(t, s, update) },
		"send": func() {
			ss.sendWin, s.sendWin = 1<<20, 1<<20
			for ss.Sendable() >= maxRecordData {
				s.PutData(hdr[:], ss, maxRecordData, false)
			}
		},
		"set window": func() { s.SetWindow(ss, 1<<20); s.SetWindow(ss, 4<<20); s.ConsumeControl(len(s.Control())) },
	} {
		f()
		if n := testing.AllocsPerRun(1000, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkReceiveData(b *testing.B) {
	for name, size := range map[string]int{"64B": 64, "16KB": maxRecordData} {
		b.Run(name, func(b *testing.B) {
			s, _, frame := steady(b, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				receiveOnce(b, s, frame)
			}
		})
	}
}

// A record with small frames of many streams.
func BenchmarkReceiveDataOfManyStreams(b *testing.B) {
	c, s := pair(b, Config{}, Config{})
	var record []byte
	for range 200 {
		cs, _ := another(b, c, s)
		record = append(record, appendFrameHeader(nil, 64, http2.FrameData, 0, cs.ID())...)
		record = append(record, make([]byte, 64)...)
	}
	b.SetBytes(200 * 64)
	b.ReportAllocs()
	for b.Loop() {
		receiveOnce(b, s, record)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(200*b.N), "ns/frame")
}

func BenchmarkPutData(b *testing.B) {
	s, ss, _ := steady(b, 1)
	var hdr [FrameHeaderLen]byte
	b.ReportAllocs()
	for b.Loop() {
		ss.sendWin, s.sendWin = 1<<20, 1<<20
		if ss.Sendable() > 0 {
			s.PutData(hdr[:], ss, maxRecordData, false)
		}
	}
}

// A connection's life: request, answer, both ends.
func BenchmarkOpenClose(b *testing.B) {
	c, s := pair(b, Config{}, Config{})
	fields, ok := connectFields(), okFields()
	b.ReportAllocs()
	for b.Loop() {
		cs, err := c.Open(fields, nil)
		if err != nil {
			b.Fatal(err)
		}
		ev, err := s.Receive(c.Control())
		if err != nil {
			b.Fatal(err)
		}
		c.ConsumeControl(len(c.Control()))
		ss := ev[0].Stream
		if err := s.Respond(ss, ok, false); err != nil {
			b.Fatal(err)
		}
		c.End(cs)
		s.End(ss)
		for _, way := range [][2]*Conn{{c, s}, {s, c}} {
			if _, err := way[1].Receive(way[0].Control()); err != nil {
				b.Fatal(err)
			}
			way[0].ConsumeControl(len(way[0].Control()))
		}
	}
	if c.CountStreams()+s.CountStreams() != 0 {
		b.Fatal("streams left")
	}
}
