// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"crypto/x509"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/tunnel/handshake"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// Sessions that drain, each for a connection that outlives its certificate, do not
// keep a pair of pods from opening another.
func TestDrainingTrunksDoNotCount(t *testing.T) {
	onLoop(t, func(w *worker) {
		e := &entry{w: w, dialing: true} // as if the dial were under way
		for range maxTrunks + 1 {
			e.trunks = append(e.trunks, &clientTrunk{e: e, w: w, unusable: true, trunk: &relay.Trunk{}, hs: &handshake.Result{}})
		}
		e.assign(&outbound{})
		if len(e.waiting) != 1 {
			t.Error("a new connection does not wait for a dial")
		}
	})
}

// BenchmarkPool is what a connection asks of the pool: the entry of its pair of
// pods, among those of many, and the one that is to carry it of the most tunnel
// connections that there can be.
func BenchmarkPool(b *testing.B) {
	for _, size := range []int{1, 10_000} {
		b.Run(fmt.Sprintf("%d pairs", size), func(b *testing.B) {
			now := time.Now()
			w := &worker{entries: map[poolKey]*entry{}}
			pod, keys := &Pod{}, make([]poolKey, size)
			for i := range keys {
				keys[i] = poolKey{
					pod: pod, dst: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}),
					id: spiffeid.RequireFromString(fmt.Sprintf("spiffe://mesh.example/ns/demo/sa/%d", i)),
				}
				e := w.entry(keys[i])
				for range maxTrunks {
					hs := &handshake.Result{Peer: identity.Peer{Expiry: now.Add(time.Hour)}}
					e.trunks = append(e.trunks, &clientTrunk{e: e, w: w, trunk: &relay.Trunk{}, hs: hs})
				}
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if best, usable := w.entry(keys[i*7919%size]).choose(now); best == nil || usable != maxTrunks {
					b.Fatalf("chose %v of %d", best, usable)
				}
			}
		})
	}
}

// What is revoked is any certificate of the path, asked with the leaf's identity.
func TestRevoked(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://mesh.example/ns/demo/sa/web")
	leaf, issuer, root := &x509.Certificate{}, &x509.Certificate{}, &x509.Certificate{}
	hs := &handshake.Result{Peer: identity.Peer{ID: id, Certificate: leaf, Path: []*x509.Certificate{leaf, issuer, root}, Expiry: time.Now()}}
	var denied *x509.Certificate
	tun := &Tunnel{}
	if tun.revoked(hs) != nil {
		t.Error("revoked without a deny list")
	}
	tun.cfg.Denied = func(c *x509.Certificate, of spiffeid.ID) (string, bool) {
		if of != id {
			t.Errorf("asked for %s", of)
		}
		return "why", c == denied
	}
	if tun.revoked(hs) != nil {
		t.Error("revoked where nothing is denied")
	}
	for _, denied = range hs.Peer.Path {
		if f := tun.revoked(hs); f == nil || f.Reason != identity.ReasonRevoked || f.Detail != "why" {
			t.Errorf("not revoked: %v", f)
		}
	}
}
