// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/handshake"
	"github.com/culvert-mesh/culvert/tunnel/relay"
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
		t.failed.warn(t.cfg.Logger, "handshake failed", "reporter", string(rep), "workload", p.Key, "peer", peer.String(), "reason", h.Reason, "detail", f.Detail)
	}
	t.cfg.Recorder.Handshake(h)
}

// shed says that streams were reset to keep the budget.
func (t *Tunnel) shed(s relay.Shed) {
	t.limits.queued.Add(uint64(s.Streams))
	bound := "node"
	if s.Peer {
		bound = "peer"
	}
	t.hoarded.warn(t.cfg.Logger, "reset streams whose applications take nothing: the memory for what peers send is used up",
		"bound", bound, "streams", s.Streams, "bytes", s.Bytes, "hint", "tunnel.memory is the bound")
}

// ended says that a session was ended for a bound on its peer.
func (t *Tunnel) ended(p *Pod, peer netip.Addr, err error) {
	var broken *h2.ConnError
	switch {
	case errors.As(err, &broken) && broken.Code == http2.ErrCodeEnhanceYourCalm:
		t.limits.calm.Add(1)
	case errors.Is(err, relay.ErrUnread):
		t.limits.unread.Add(1)
	default:
		return
	}
	t.failed.warn(t.cfg.Logger, "close tunnel connection: its peer is beyond a bound", "workload", p.Key, "peer", peer.String(), "err", err)
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
