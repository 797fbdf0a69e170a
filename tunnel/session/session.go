// SPDX-License-Identifier: Apache-2.0

// Package session is one tunnel connection as a state machine: TLS records
// (tunnel/record) with HTTP/2 in them (tunnel/h2). Ciphertext goes in, events
// come out; control frames and data that the caller has laid into record slots
// come out as ciphertext.
//
// It knows no socket, no goroutine and no clock, so it can be frozen between
// any two calls and thawed elsewhere: Freeze and Thaw. Who reads and writes the
// socket is tunnel/relay.
package session

import (
	"fmt"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

// Session is one side of a tunnel connection. It is not safe for concurrent
// use.
type Session struct {
	Records *record.Layer
	H2      *h2.Conn

	partial []byte // the beginning of a record, or what the handshake had read beyond its end
	unsent  []byte // sealed, not yet accepted by the socket when the session was frozen
}

// New joins a record layer to an HTTP/2 connection. leftover is what was read
// behind the handshake's last record; it is copied.
func New(records *record.Layer, conn *h2.Conn, leftover []byte) *Session {
	s := &Session{Records: records, H2: conn}
	s.Keep(leftover)
	return s
}

// Restore puts what was kept by Keep at the front of buf, for the next bytes
// of the socket to follow, and returns its length.
func (s *Session) Restore(buf []byte) int {
	n := copy(buf, s.partial)
	s.partial = s.partial[:0] // its memory serves the next Keep
	return n
}

// Pending is how many bytes Restore would put back.
func (s *Session) Pending() int { return len(s.partial) }

// Keep keeps the beginning of a record that is not whole yet. It copies rest. A
// session with nothing to keep holds no memory for it.
func (s *Session) Keep(rest []byte) {
	if len(rest) == 0 {
		s.partial = nil
		return
	}
	s.partial = append(s.partial[:0], rest...)
}

// Next takes one record from the front of buf, opens it in place, and returns
// its length and the events in it. A length of 0 without an error means that
// the record is not whole yet. Events and what they hold are valid until the
// next call, or until buf is used again. Errors are io.EOF (close_notify), the
// record layer's, and *h2.ConnError; all of them end the session.
func (s *Session) Next(buf []byte) (int, []h2.Event, error) {
	data, n, err := s.Records.Open(buf)
	if err != nil || n == 0 || len(data) == 0 {
		return n, nil, err
	}
	events, err := s.H2.Receive(data)
	return n, events, err
}

// FillControl lays pending control frames behind the used bytes of a record
// slot, as many as go in, and returns how many bytes it laid.
func (s *Session) FillControl(slot []byte, used int) int {
	c := s.H2.Control()
	n := copy(slot[record.HeaderLen+used:record.HeaderLen+record.MaxPlaintext], c)
	if n > 0 {
		s.H2.ConsumeControl(n)
	}
	return n
}

// Close overwrites the session's keys. It sends nothing.
func (s *Session) Close() {
	s.Records.Close()
	s.partial = nil
}

// State is a frozen session. It holds keys: whoever keeps it overwrites it.
type State struct {
	Records record.State
	H2      h2.State
	Partial []byte
	Unsent  []byte
}

// Freeze takes the session's state out of it. unsent is what has been sealed
// and not yet been taken by the socket: it must reach the peer first. The
// session is not to be used afterwards.
func (s *Session) Freeze(unsent []byte) State {
	return State{
		Records: s.Records.Freeze(),
		H2:      s.H2.Freeze(),
		Partial: s.partial,
		Unsent:  append(s.unsent, unsent...),
	}
}

// Thaw makes a session of a frozen one, with its streams.
func Thaw(st State) (*Session, []*h2.Stream, error) {
	records, err := record.Thaw(st.Records)
	if err != nil {
		return nil, nil, fmt.Errorf("thaw records: %w", err)
	}
	conn, streams := h2.Thaw(st.H2)
	return &Session{Records: records, H2: conn, partial: st.Partial, unsent: st.Unsent}, streams, nil
}

// Unsent gives the bytes that must be sent before anything else after a thaw,
// once.
func (s *Session) Unsent() []byte {
	u := s.unsent
	s.unsent = nil
	return u
}
