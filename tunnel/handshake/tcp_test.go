// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"context"
	"testing"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/testtcp"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

// A client sends before it can know that it is refused, so the server's close
// becomes a reset: the alert that was sent before it must still be read.
func TestRefusalIsReadBeforeTheReset(t *testing.T) {
	a := newAuthority(t, meshTD)
	for _, linger := range []int{-1, 0} {
		cc, sc := testtcp.Pair(t)
		cfg := a.server()
		cfg.Expect = serverID // the client is somebody else
		closed := make(chan error)
		go func() {
			// Both of the client's last flights are there, the data unread,
			// when the server closes.
			_, err := Server(context.Background(), sc, cfg)
			if linger >= 0 {
				sc.SetLinger(linger)
			}
			sc.Close()
			closed <- err
		}()
		h := &holding{Conn: cc}
		r, err := Client(context.Background(), h, a.client())
		if err != nil {
			t.Fatal(err)
		}
		c := newStream(t, h, r)
		for range 20 {
			c.send(t, "data that nobody reads")
		}
		if _, err := cc.Write(h.held); err != nil {
			t.Fatal(err)
		}
		wantFailure(t, <-closed, identity.ReasonIdentityMismatch)
		c.Conn = cc
		refusedAtFirstRecord(t, c, record.AlertAccessDenied)
	}
}

// BenchmarkHandshake is both ends together, hybrid key exchange and two chains.
func BenchmarkHandshake(b *testing.B) {
	a := newAuthority(b, meshTD)
	client, server := a.client(), a.server()
	for b.Loop() {
		cc, sc := testtcp.Pair(b)
		c, s := both(b, cc, sc, client, server)
		if c.err != nil || s.err != nil {
			b.Fatal(c.err, s.err)
		}
		cc.SetLinger(0)
		cc.Close()
		sc.Close()
	}
}

func TestOverTCP(t *testing.T) {
	a := newAuthority(t, meshTD)
	cc, sc := testtcp.Pair(t)
	c, s := both(t, cc, sc, a.client(), a.server())
	if c.err != nil || s.err != nil {
		t.Fatalf("client: %v, server: %v", c.err, s.err)
	}
	client, server := newStream(t, cc, c.Result), newStream(t, sc, s.Result)
	client.send(t, "ping")
	server.expect(t, "ping")
	server.send(t, "pong")
	client.expect(t, "pong")
}
