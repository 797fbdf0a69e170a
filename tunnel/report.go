// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"fmt"
	"net/netip"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/handshake"
)

// recordHandshake hands over one handshake's result. hs is nil where it
// failed; f is nil where it succeeded.
func (t *Tunnel) recordHandshake(p *Pod, rep telemetry.Reporter, peer netip.Addr, hs *handshake.Result, f *identity.Failure) {
	h := telemetry.Handshake{Reporter: rep}
	if hs != nil {
		h.Duration = hs.Duration
	}
	if f != nil {
		h.Reason = string(f.Reason)
		t.cfg.Logger.Warn("handshake failed", "reporter", string(rep), "workload", p.Key, "peer", peer.String(), "reason", h.Reason, "detail", f.Detail)
	}
	t.cfg.Recorder.Handshake(h)
}

// refusalReason is the source's reason for a status that the destination
// answered. Ours name theirs in a header; of other implementations the status
// is all there is.
func refusalReason(status int, reason string) telemetry.Reason {
	switch status {
	case 401, 403:
		return telemetry.ReasonDeniedByPeer
	}
	if r, ok := telemetry.ParseReason(reason); ok && r != telemetry.ReasonOK {
		return r
	}
	if status == 400 {
		return telemetry.ReasonRefused
	}
	return telemetry.ReasonUnreachable
}

func refusalDetail(status int, reason string) string {
	if reason == "" {
		return fmt.Sprintf("the peer answered CONNECT with status %d", status)
	}
	return fmt.Sprintf("the peer answered CONNECT with status %d (%s)", status, reason)
}
