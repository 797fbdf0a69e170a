// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"bytes"
	"crypto/tls"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/tunnel/record"
)

// FuzzRecords: crypto/tls and our record layer exchange data in pieces of any size
// after a handshake, with KeyUpdates of ours and empty records between them: each
// reads what the other wrote.
func FuzzRecords(f *testing.F) {
	a := newAuthority(f, spiffeid.RequireTrustDomainFromString("mesh.example"))
	clientConfig, serverConfig := a.client(), a.server()
	f.Add([]byte{1, 0, 5, 250, 7, 3}, []byte("data of ours"), []byte("data of theirs"))
	f.Add([]byte{255}, bytes.Repeat([]byte("x"), 2000), []byte{})
	f.Fuzz(func(t *testing.T, cuts, ours, theirs []byte) {
		if len(cuts) > 50 || len(ours) > 8<<10 || len(theirs) > 8<<10 {
			return
		}
		c, s := net.Pipe()
		defer c.Close()
		defer s.Close()
		for _, x := range []net.Conn{c, s} {
			_ = x.SetDeadline(time.Now().Add(10 * time.Second))
		}
		client := &side{cfg: clientConfig, client: true}
		peer := tls.Client(c, client.config())
		client.conn.Conn = c
		done := make(chan error, 1)
		go func() { done <- peer.Handshake() }()
		r, err := Server(t.Context(), s, serverConfig)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		layer, err := record.New(r.Secrets)
		if err != nil {
			t.Fatal(err)
		}
		// Ours to theirs.
		var wire []byte
		slot := make([]byte, record.SlotLen)
		rest := ours
		for i := 0; len(rest) > 0; i++ {
			n := 100
			if i < len(cuts) {
				n = int(cuts[i])
			}
			switch {
			case n%16 == 3 && i < 10: // crypto/tls takes 16 in a row without data
				wire = layer.UpdateKeys(wire, false)
			default:
				n = min(n, len(rest))
				if n == 0 && i >= 10 {
					n = 1
				}
				copy(slot[record.HeaderLen:], rest[:n])
				wire = append(wire, slot[:layer.Seal(slot, n)]...)
				rest = rest[n:]
			}
		}
		go func() { _, _ = s.Write(wire) }()
		got := make([]byte, len(ours))
		for n := 0; n < len(got); {
			k, err := peer.Read(got[n:])
			if err != nil {
				t.Fatalf("crypto/tls, after %d of %d bytes: %v", n, len(got), err)
			}
			n += k
		}
		if !bytes.Equal(got, ours) {
			t.Fatal("crypto/tls read other bytes than were written")
		}
		// Theirs to ours.
		go func() { _, _ = peer.Write(theirs) }()
		in := append([]byte(nil), r.Leftover...)
		got = nil
		buf := make([]byte, 4096)
		for len(got) < len(theirs) {
			data, n, err := layer.Open(in)
			if err != nil {
				t.Fatalf("after %d of %d bytes: %v", len(got), len(theirs), err)
			}
			if n == 0 {
				k, err := s.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				in = append(in, buf[:k]...)
				continue
			}
			got = append(got, data...)
			in = in[n:]
		}
		if !bytes.Equal(got, theirs) {
			t.Fatal("other bytes than crypto/tls wrote")
		}
	})
}
