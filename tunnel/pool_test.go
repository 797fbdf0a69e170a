// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"crypto/x509"
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
