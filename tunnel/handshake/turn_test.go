// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"context"
	"crypto"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvert-mesh/culvert/identity"
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

// queue is a turn, for which a bubble's time goes on while it is waited for: for a
// mutex it does not.
type queue chan struct{}

func (q queue) Lock()   { q <- struct{}{} }
func (q queue) Unlock() { <-q }

// The wait for a turn is of the handshake's time: who had none before that was over
// has given the peer up, as the peer has, and computes nothing for it.
func TestTurnsComeOutOfTheTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, meshTD)
		for name, shake := range map[string]func(context.Context, net.Conn, Config) (*Result, error){"client": Client, "server": Server} {
			turn := make(queue, 1)
			turn.Lock()
			c, peer := net.Pipe()
			cfg := map[string]Config{"client": a.client(), "server": a.server()}[name]
			cfg.Turn, cfg.Timeout = turn, time.Second
			begun := time.Now()
			time.AfterFunc(cfg.Timeout, turn.Unlock)
			_, err := shake(t.Context(), c, cfg)
			var f *identity.Failure
			if !errors.As(err, &f) || f.Reason != identity.ReasonTimeout {
				t.Errorf("%s: %v, want a timeout", name, err)
			}
			if took := time.Since(begun); took != cfg.Timeout {
				t.Errorf("%s: it took %v, want %v", name, took, cfg.Timeout)
			}
			c.Close()
			peer.Close()
		}
	})
}
