// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/tunnel/record"
)

// stream is a connection after its handshake, as an owner would use it.
type stream struct {
	net.Conn
	l   *record.Layer
	buf []byte
}

func newStream(t testing.TB, c net.Conn, r *Result) *stream {
	t.Helper()
	l, err := record.New(r.Secrets)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return &stream{Conn: c, l: l, buf: r.Leftover}
}

func (s *stream) send(t testing.TB, data string) {
	t.Helper()
	slot := make([]byte, record.SlotLen)
	n := copy(slot[record.HeaderLen:], data)
	s.raw(t, append(s.l.Due(nil), slot[:s.l.Seal(slot, n)]...))
}

func (s *stream) raw(t testing.TB, b []byte) {
	t.Helper()
	if _, err := s.Write(b); err != nil {
		t.Fatal(err)
	}
}

var errTruncated = errors.New("truncated: no close_notify")

// next opens one record.
func (s *stream) next() (string, error) {
	for {
		data, n, err := s.l.Open(s.buf)
		d := string(data)
		s.buf = s.buf[n:]
		if err != nil || n > 0 {
			return d, err
		}
		b := make([]byte, record.SlotLen)
		k, err := s.Read(b)
		s.buf = append(s.buf, b[:k]...)
		if err == io.EOF {
			return "", errTruncated
		}
		if err != nil {
			return "", err
		}
	}
}

// expect reads until it has all of want.
func (s *stream) expect(t testing.TB, want string) {
	t.Helper()
	got := ""
	for len(got) < len(want) {
		d, err := s.next()
		if err != nil {
			t.Fatalf("got %q, %v, want %q", got, err, want)
		}
		got += d
	}
	if got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
}

// end reads the error that ends the stream.
func (s *stream) end(t testing.TB) error {
	t.Helper()
	for {
		d, err := s.next()
		if err != nil {
			return err
		}
		if d != "" {
			t.Logf("before the end: %q", d)
		}
	}
}
