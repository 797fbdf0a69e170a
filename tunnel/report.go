// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/handshake"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// dialShook hands over the result of a handshake that we began; see shook.
func (t *Tunnel) dialShook(k poolKey, hs *handshake.Result, f *identity.Failure) {
	t.shook(k.pod, telemetry.ReporterSource, k.dst, k.id, hs, f)
}

// peerShook hands over the result of a handshake that a peer began; see shook. Of
// such a peer nothing is expected but that it is one of the mesh's.
func (t *Tunnel) peerShook(p *Pod, peer netip.Addr, hs *handshake.Result, f *identity.Failure) {
	t.shook(p, telemetry.ReporterDestination, peer, spiffeid.ID{}, hs, f)
}

// shook hands over one handshake's result. hs is nil where it did not end, f where
// all went well; both are there where the end was not the last word.
func (t *Tunnel) shook(p *Pod, rep telemetry.Reporter, peer netip.Addr, expected spiffeid.ID, hs *handshake.Result, f *identity.Failure) {
	h := telemetry.Handshake{Reporter: rep}
	if hs != nil {
		h.Duration = hs.Duration
	}
	if f != nil {
		h.Reason = string(f.Reason)
	}
	t.cfg.Recorder.Handshake(h)

	log := t.cfg.Logger
	if f == nil && !log.Enabled(t.ctx, slog.LevelDebug) {
		return
	}
	args := []any{"reporter", string(rep), "workload", p.Key, "peer", peer.String()}
	if !expected.IsZero() {
		args = append(args, "expected", expected.String())
	}
	switch {
	case hs != nil:
		args = append(args, "identity", hs.Peer.ID.String())
	case f != nil && f.Claimed != "":
		args = append(args, "claimed", f.Claimed)
	}
	if f != nil {
		t.failed.warn(log, "handshake failed", append(args, "reason", h.Reason, "detail", f.Detail)...)
		return
	}
	log.Debug("handshake succeeded", append(args, "duration", h.Duration, "cipher", tls.CipherSuiteName(hs.CipherSuite), "group", hs.Group.String())...)
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

// ended says that a session was ended for what its peer did, and has one wait that
// broke the rules.
func (t *Tunnel) ended(p *Pod, peer netip.Addr, err error) {
	var broken *h2.ConnError
	switch {
	case errors.Is(err, relay.ErrUnread):
		t.limits.unread.Add(1)
	case breached(err):
		t.pauses.breach(peer, time.Now())
		if errors.As(err, &broken) && broken.Code == http2.ErrCodeEnhanceYourCalm {
			t.limits.calm.Add(1)
		}
	default:
		return
	}
	t.failed.warn(t.cfg.Logger, "close tunnel connection: its peer is beyond a bound, or has broken the protocol", "workload", p.Key, "peer", peer.String(), "err", err)
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
