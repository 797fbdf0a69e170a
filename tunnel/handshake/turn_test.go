// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"crypto"
	"io"
	"sync"
	"sync/atomic"
	"testing"
)

// witness is a key that looks whether a turn is held when it signs.
type witness struct {
	crypto.Signer
	turn         *sync.Mutex
	signed, held *atomic.Int32
}

func (w witness) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	w.signed.Add(1)
	if w.turn.TryLock() {
		w.turn.Unlock()
	} else {
		w.held.Add(1)
	}
	return w.Signer.Sign(rand, digest, opts)
}

// Both sides have one turn between them: each computes with it, and gives it up
// while it waits for the other, or neither would end.
func TestTurn(t *testing.T) {
	a := newAuthority(t, meshTD)
	var turn sync.Mutex
	var signed, held atomic.Int32
	client, server := a.client(), a.server()
	for _, c := range []*Config{&client, &server} {
		c.Turn = &turn
		c.SVID.Key = witness{c.SVID.Key, &turn, &signed, &held}
	}
	cc, sc := sockets(t)
	c, s := both(t, cc, sc, client, server)
	if c.err != nil || s.err != nil {
		t.Fatalf("client: %v, server: %v", c.err, s.err)
	}
	if signed.Load() != 2 || held.Load() != 2 {
		t.Errorf("%d signatures, %d of them with the turn, want 2", signed.Load(), held.Load())
	}
	if !turn.TryLock() {
		t.Error("the turn is held after the end")
	}
}
