// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"testing"

	"golang.org/x/net/http2/hpack"
)

// connectFields is a request as tunnel/hbone makes it.
func connectFields() []hpack.HeaderField {
	return []hpack.HeaderField{
		{Name: ":method", Value: "CONNECT"},
		{Name: ":authority", Value: "10.0.0.1:8080"},
		{Name: "baggage", Value: "k8s.namespace.name=demo,k8s.pod.name=a-1"},
	}
}

func okFields() []hpack.HeaderField { return []hpack.HeaderField{{Name: ":status", Value: "200"}} }

// take empties a connection's control bytes.
func take(c *Conn) []byte {
	b := append([]byte(nil), c.Control()...)
	c.ConsumeControl(len(b))
	return b
}

// receive fails the test for an error, and copies what the events alias.
func receive(t testing.TB, c *Conn, p []byte) []Event {
	t.Helper()
	events, err := c.Receive(p)
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	return copyEvents(events)
}

func copyEvents(events []Event) []Event {
	out := make([]Event, len(events))
	for i, e := range events {
		e.Data = append([]byte(nil), e.Data...)
		out[i] = e
	}
	return out
}

func kinds(events []Event) []EventKind {
	var k []EventKind
	for _, e := range events {
		k = append(k, e.Kind)
	}
	return k
}

// pair is two ends that have exchanged SETTINGS.
func pair(t testing.TB, client, server Config) (c, s *Conn) {
	t.Helper()
	client.Client = true
	c, s = New(client), New(server)
	pump(t, c, s)
	return c, s
}

// pump passes control bytes until there are none, and returns the events of
// both ends.
func pump(t testing.TB, c, s *Conn) (ofC, ofS []Event) {
	t.Helper()
	for len(c.Control()) > 0 || len(s.Control()) > 0 {
		ofS = append(ofS, receive(t, s, take(c))...)
		ofC = append(ofC, receive(t, c, take(s))...)
	}
	return ofC, ofS
}

// frameData is a DATA frame of n bytes.
func frameData(c *Conn, s *Stream, p []byte, end bool) []byte {
	b := make([]byte, FrameHeaderLen, FrameHeaderLen+len(p))
	c.PutData(b, s, len(p), end)
	return append(b, p...)
}

func TestConnectBothWays(t *testing.T) {
	c, s := pair(t, Config{}, Config{})
	cs, err := c.Open(connectFields(), "user")
	if err != nil {
		t.Fatal(err)
	}
	_, ev := pump(t, c, s)
	if len(ev) != 1 || ev[0].Kind != EventHeaders || len(ev[0].Headers) != 3 {
		t.Fatalf("server events %v", ev)
	}
	ss := ev[0].Stream
	if err := s.Respond(ss, okFields(), false); err != nil {
		t.Fatal(err)
	}
	ev, _ = pump(t, c, s)
	if len(ev) != 1 || ev[0].Kind != EventHeaders || ev[0].Stream != cs || ev[0].Stream.User != "user" {
		t.Fatalf("client events %v", ev)
	}
	if got := cs.Sendable(); got != DefaultWindow {
		t.Fatalf("sendable %d", got)
	}
	ev = receive(t, s, frameData(c, cs, []byte("hello"), true))
	if len(ev) != 2 || string(ev[0].Data) != "hello" || ev[1].Kind != EventEnd || !cs.LocalClosed() || ss.Closed() {
		t.Fatalf("server events %v", ev)
	}
	ev = receive(t, c, frameData(s, ss, []byte("bye"), true))
	if len(ev) != 2 || string(ev[0].Data) != "bye" || ev[1].Kind != EventEnd || !cs.Closed() || !ss.Closed() {
		t.Fatalf("client events %v", ev)
	}
	c.Taken(cs, 3)
	s.Taken(ss, 5)
	if len(c.streams)+len(s.streams) != 0 || c.CountStreams()+s.CountStreams() != 0 {
		t.Fatalf("streams left: %d %d", len(c.streams), len(s.streams))
	}
}
