// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"slices"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/tunnel/handshake"
)

// Revoke applies Config.Denied to what is open: a tunnel connection whose peer is
// denied by now, or a certificate that it chains by, is closed, and its streams
// are reset. Call it after what Denied answers has changed. It does not wait. A
// handshake that is under way meets the new answer when it ends.
func (t *Tunnel) Revoke() {
	for _, w := range t.workers {
		w.Loop.Post(w.revoke)
	}
}

func (w *worker) revoke() {
	w.each(func(e *entry) {
		for _, c := range slices.Clone(e.trunks) {
			if f := w.t.revoked(c.hs); f != nil {
				w.t.sayRevoked(e.key.pod, c.hs, f)
				c.close(f)
			}
		}
	})
	for in := range w.inbound {
		if f := w.t.revoked(in.hs); f != nil {
			w.t.sayRevoked(in.pod, in.hs, f)
			in.trunk.Close(f)
		}
	}
}

func (t *Tunnel) sayRevoked(p *Pod, hs *handshake.Result, f *identity.Failure) {
	t.cfg.Logger.Warn("close tunnel connection: its peer is revoked", "workload", p.Key, "identity", hs.Peer.ID.String(), "why", f.Detail)
}

// revoked says why a peer that was let in would not be now; nil: it would be.
func (t *Tunnel) revoked(hs *handshake.Result) *identity.Failure {
	if t.cfg.Denied == nil {
		return nil
	}
	for _, c := range hs.Peer.Path {
		if why, denied := t.cfg.Denied(c, hs.Peer.ID); denied {
			return &identity.Failure{Reason: identity.ReasonRevoked, Detail: why}
		}
	}
	return nil
}
