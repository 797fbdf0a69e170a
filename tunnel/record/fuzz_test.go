// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"testing"
)

// FuzzOpen gives Open what no peer protects.
func FuzzOpen(f *testing.F) {
	client, _ := pair(f, suites[0])
	f.Add(seal(client, []byte("hello")), uint8(0))
	f.Add([]byte{23, 3, 3, 0, 17}, uint8(1))
	f.Add([]byte{21, 3, 3, 0, 2, 2, 40}, uint8(2))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, suite uint8) {
		_, us := pair(t, suites[int(suite)%len(suites)])
		for len(b) > 0 {
			d, n, err := us.Open(b)
			if n > len(b) || len(d) > n {
				t.Fatalf("%d bytes, n %d of %d", len(d), n, len(b))
			}
			if err != nil {
				if _, _, again := us.Open(b); again != err {
					t.Fatalf("%v, then %v", err, again)
				}
				return
			}
			if n == 0 {
				if len(b) >= SlotLen {
					t.Fatal("a whole slot and no record")
				}
				return
			}
			b = b[n:]
		}
	})
}

// FuzzPeer gives Open what a peer with the right keys may say: the script is a
// list of (type, length, content) that are sealed one by one. No application
// data may be lost, added or changed up to the first error.
func FuzzPeer(f *testing.F) {
	f.Add([]byte{23, 3, 'a', 'b', 'c', 22, 5, 24, 0, 0, 1, 1, 23, 1, 'd'}, true)
	f.Add([]byte{22, 6, 4, 0, 0, 2, 9, 9, 22, 2, 24, 0, 22, 3, 0, 1, 0}, true)
	f.Add([]byte{21, 2, 1, 0}, false)
	f.Add([]byte{22, 4, 4, 0, 0, 1, 23, 0}, true)
	f.Add([]byte{23, 0, 0, 0, 24, 1, 1}, false)
	f.Fuzz(func(t *testing.T, script []byte, client bool) {
		us, peer := pair(t, suites[0])
		if !client {
			us, peer = peer, us
		}
		var hand []byte // the peer's handshake bytes, to know when it updates
		for len(script) >= 2 {
			typ, n := script[0], int(script[1])
			script = script[2:]
			p := script[:min(n, len(script))]
			script = script[len(p):]

			d, k, err := us.Open(peer.appendRecord(nil, typ, p))
			if err != nil {
				if len(d) > 0 {
					t.Fatalf("data with an error: %q, %v", d, err)
				}
				return
			}
			if want := HeaderLen + len(p) + typeLen + tagLen; k != want {
				t.Fatalf("record of %d bytes, n %d", want, k)
			}
			switch typ {
			case typeApplicationData:
				if !bytes.Equal(d, p) {
					t.Fatalf("got %q, want %q", d, p)
				}
				continue
			case typeHandshake:
				hand = append(hand, p...)
				for len(hand) >= 4 {
					size := 4 + (int(hand[1])<<16 | int(hand[2])<<8 | int(hand[3]))
					if len(hand) < size {
						break
					}
					if hand[0] == messageKeyUpdate {
						if err := peer.out.update(peer.suite); err != nil {
							t.Fatal(err)
						}
					}
					hand = hand[size:]
				}
			}
			if len(d) > 0 {
				// The type byte may be 0, which makes the content's end the type.
				if typ != 0 {
					t.Fatalf("data %q in a record of type %d", d, typ)
				}
				return
			}
			if typ == 0 {
				return // what the record was is not followed further here
			}
			if us.NeedsControl() {
				if b := us.Due(nil); len(b) == 0 {
					t.Fatal("control is due and does not come")
				} else if _, _, err := peer.Open(b); err != nil {
					t.Fatalf("peer: %v", err)
				}
			}
		}
	})
}
