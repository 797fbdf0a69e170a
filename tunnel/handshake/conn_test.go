// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
)

// chunks is a connection that gives its bytes in pieces.
type chunks struct {
	net.Conn
	b    []byte
	size []byte // of the pieces, in turn
	i    int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.b) == 0 {
		return 0, io.EOF
	}
	n := 1
	if len(c.size) > 0 {
		n += int(c.size[c.i%len(c.size)])
		c.i++
	}
	n = copy(p, c.b[:min(n, len(c.b))])
	c.b = c.b[n:]
	return n, nil
}

// FuzzConn: what is read and what is left over are what was sent, and no read
// goes past a record's end.
func FuzzConn(f *testing.F) {
	f.Add([]byte{22, 3, 1, 0, 2, 1, 2, 23, 3, 3, 0, 0, 23, 3, 3, 0, 1, 9, 22, 3}, []byte{3, 200}, 2)
	f.Add([]byte{22, 3, 1, 0, 1, 9, 22, 3, 1, 0xff, 0xff, 1, 2, 3}, []byte{0}, 9)
	f.Fuzz(func(t *testing.T, sent, sizes []byte, records int) {
		c := &conn{Conn: &chunks{b: bytes.Clone(sent), size: sizes}}
		var got []byte
		for range min(records, 100) {
			if len(got)+5 > len(sent) {
				break
			}
			end := len(got) + 5 + int(binary.BigEndian.Uint16(sent[len(got)+3:]))
			for len(got) < end {
				p := make([]byte, 700)
				n, err := c.Read(p)
				if err != nil {
					if c.over {
						t.Fatalf("no record was given that crypto/tls refuses: %v", err)
					}
					if end <= len(sent) {
						t.Fatalf("%v after %d bytes", err, len(got))
					}
					return
				}
				if c.over {
					if n > 0 && !bytes.Equal(p[:n], append(bytes.Clone(sent[len(got):len(got)+3]), 0xff, 0xff)[:n]) {
						t.Fatalf("%x", p[:n])
					}
					return
				}
				got = append(got, p[:n]...)
			}
			if len(got) != end || !c.atBoundary() {
				t.Fatalf("read to %d, the record ends at %d", len(got), end)
			}
		}
		if !bytes.Equal(got, sent[:len(got)]) {
			t.Fatal("other bytes than were sent")
		}
		if left := c.leftover(); !bytes.Equal(left, sent[len(got):len(got)+len(left)]) {
			t.Fatal("what is left over is not what follows")
		}
	})
}

// What a peer may send until its handshake is over: the limit passes, with one
// byte more the record that holds it is one that crypto/tls refuses.
func TestConnBounds(t *testing.T) {
	for n, want := range map[int]bool{maxBytes: false, maxBytes + 1: true} {
		var sent []byte
		for left := n; left > 0; {
			size := min(left-5, 16384)
			if rest := left - 5 - size; rest > 0 && rest < 6 {
				size -= 6 // the last record has a body too
			}
			sent = append(sent, 22, 3, 1, byte(size>>8), byte(size))
			sent = append(sent, make([]byte, size)...)
			left -= 5 + size
		}
		c := &conn{Conn: &chunks{b: sent, size: []byte{200}}}
		got, err := io.Copy(io.Discard, struct{ io.Reader }{c})
		if c.over != want || err != nil && !want {
			t.Errorf("%d bytes: over %v after %d bytes, %v", n, c.over, got, err)
		}
	}
}
