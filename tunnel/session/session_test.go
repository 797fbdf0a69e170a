// SPDX-License-Identifier: Apache-2.0

package session_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"testing"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/session"
)

// layers are both ends' record layers, under keys that never change.
func layers(t testing.TB) (client, server *record.Layer) {
	t.Helper()
	make := func(client bool, read, write byte) *record.Layer {
		l, err := record.New(record.Secrets{
			Suite: tls.TLS_AES_128_GCM_SHA256, Client: client,
			Read: bytes.Repeat([]byte{read}, 32), Write: bytes.Repeat([]byte{write}, 32),
		})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	return make(true, 1, 2), make(false, 2, 1)
}

// seal is one record.
func seal(l *record.Layer, p []byte) []byte {
	slot := make([]byte, record.SlotLen)
	copy(slot[record.HeaderLen:], p)
	return slot[:l.Seal(slot, len(p))]
}

func TestKeepAndRestore(t *testing.T) {
	_, l := layers(t)
	leftover := []byte("behind the handshake")
	s := session.New(l, h2.New(h2.Config{}), leftover)
	clear(leftover)
	buf := make([]byte, 100)
	if n := s.Restore(buf); string(buf[:n]) != "behind the handshake" || s.Pending() != 0 || s.Restore(buf) != 0 {
		t.Fatalf("restored %q, %d pending", buf[:n], s.Pending())
	}
	rest := bytes.Repeat([]byte("rest"), 1000)
	s.Keep(rest)
	buf = make([]byte, len(rest))
	if s.Pending() != len(rest) || s.Restore(buf) != len(rest) || !bytes.Equal(buf, rest) {
		t.Fatal("what was kept is not restored")
	}
	// While bytes flow nothing is allocated.
	if n := testing.AllocsPerRun(100, func() { s.Keep(rest); s.Restore(buf) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	s.Keep(rest)
	s.Keep(nil)
	if s.Pending() != 0 {
		t.Errorf("%d bytes pending of nothing", s.Pending())
	}
}

func TestFillControlFillsTheRoom(t *testing.T) {
	client, server := layers(t)
	s := session.New(client, h2.New(h2.Config{Client: true}), nil)
	want := bytes.Clone(s.H2.Control())
	slot := make([]byte, record.SlotLen)
	const room = 7
	var got []byte
	for used := record.MaxPlaintext - room; len(got) < len(want); {
		n := s.FillControl(slot, used)
		if n == 0 || n > room {
			t.Fatalf("%d bytes laid into room for %d", n, room)
		}
		got = append(got, slot[record.HeaderLen+used:][:n]...)
	}
	if !bytes.Equal(got, want) || s.FillControl(slot, 0) != 0 || s.FillControl(slot, record.MaxPlaintext) != 0 {
		t.Fatalf("laid %q, want %q", got, want)
	}
	if data, _, err := server.Open(seal(client, got)); err != nil || !bytes.Equal(data, want) {
		t.Fatalf("%q, %v", data, err)
	}
}

// The end of a session is told in the words of the layer that ended it.
func TestErrorsOfNext(t *testing.T) {
	var alert *record.LocalAlert
	var broken *h2.ConnError
	for _, tt := range []struct {
		name string
		in   func(l *record.Layer) []byte
		want func(error) bool
	}{
		{"close_notify", func(l *record.Layer) []byte { return l.AppendAlert(nil, record.AlertCloseNotify) },
			func(err error) bool { return errors.Is(err, io.EOF) }},
		{"garbage", func(*record.Layer) []byte { return []byte("GET / HTTP/1.1\r\n\r\n") },
			func(err error) bool { return errors.As(err, &alert) }},
		{"no preface", func(l *record.Layer) []byte { return seal(l, []byte("GET / HTTP/1.1\r\n\r\n")) },
			func(err error) bool { return errors.As(err, &broken) }},
	} {
		client, server := layers(t)
		s := session.New(server, h2.New(h2.Config{}), nil)
		in := tt.in(client)
		if n, _, err := s.Next(in[:3]); n != 0 || err != nil {
			t.Errorf("%s: the beginning of a record is %d bytes long, %v", tt.name, n, err)
		}
		for range 2 { // and it stays
			if _, _, err := s.Next(bytes.Clone(in)); !tt.want(err) {
				t.Errorf("%s: %v", tt.name, err)
				break
			}
			if tt.name == "no preface" {
				in = seal(client, []byte("more"))
			}
		}
	}
}

func TestThawRefusesASessionThatHadEnded(t *testing.T) {
	_, l := layers(t)
	s := session.New(l, h2.New(h2.Config{}), nil)
	s.Close()
	if _, _, err := session.Thaw(s.Freeze(nil)); err == nil {
		t.Fatal("a closed session was thawed")
	}
}
