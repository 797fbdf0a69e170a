// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/handshake"
	"github.com/culvert-mesh/culvert/tunnel/hbone"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// maxStreams is how many streams a peer may have on one connection. Memory is
// bounded by their windows.
const maxStreams = 4096

// acceptPeer takes a connection to the pod's HBONE port. It runs on the loop
// of the pod's listeners; the handshake runs in a goroutine.
func (p *Pod) acceptPeer(fd int) {
	t := p.t
	local, remote, ok := ends(fd)
	if !ok {
		unix.Close(fd)
		return
	}
	wait, ok := t.pauses.next(remote.Addr(), p.w.Loop.Now())
	if !ok {
		refuse(fd)
		t.limits.paused.Add(1)
		t.peerShook(p, remote.Addr(), nil, &identity.Failure{Reason: identity.ReasonTimeout, Detail: (&pausedError{wait}).Error()})
		return
	}
	src, err := t.sources.greet(remote.Addr())
	if err != nil {
		refuse(fd)
		t.peerShook(p, remote.Addr(), nil, &identity.Failure{Reason: identity.ReasonTimeout, Detail: err.Error()})
		return
	}
	if !p.start(func() {
		begun := false
		if sleep(p.ctx, wait) {
			begun = t.greet(p, fd, local, remote, src)
		} else {
			refuse(fd)
		}
		t.sources.greeted(src)
		if !begun {
			t.sources.part(src)
		}
	}) {
		refuse(fd)
		t.sources.greeted(src)
		t.sources.part(src)
	}
}

// acceptNone refuses a connection to the pod's HBONE port, for want of
// descriptors.
func (p *Pod) acceptNone(fd int) {
	_, remote, ok := ends(fd)
	refuse(fd)
	if ok {
		p.t.peerShook(p, remote.Addr(), nil, &identity.Failure{Reason: identity.ReasonTimeout, Detail: errNoDescriptors.Error()})
	}
}

// greet shakes hands with a peer and gives the session to a loop. It reports
// whether src is the session's from then on.
func (t *Tunnel) greet(p *Pod, fd int, local, remote netip.AddrPort, src *source) bool {
	c := newNetConn(fd, local, remote)
	svid, err := t.cfg.Identity.SVID(p.ctx, p.Identity)
	if err != nil {
		c.Close()
		var f *identity.Failure
		if errors.As(err, &f) { // our own certificate's time is over
			t.peerShook(p, remote.Addr(), nil, f)
			return false
		}
		t.cfg.Logger.Error("no certificate for workload", "identity", p.Identity, "err", err)
		return false
	}
	hs, err := handshake.Server(p.ctx, c, handshake.Config{SVID: svid, Verifier: t.verifier(), Timeout: t.cfg.HandshakeTimeout, Turn: t.turns.of(remote.Addr())})
	if err != nil {
		var f *identity.Failure
		if !errors.As(err, &f) {
			f = &identity.Failure{Reason: identity.ReasonTLSProtocol, Detail: err.Error(), Err: err}
		}
		t.peerShook(p, remote.Addr(), nil, f)
		c.part(p.ctx)
		return false
	}
	d, err := newSession(c, hs, h2.Config{MaxConcurrentStreams: maxStreams})
	if err != nil {
		t.cfg.Logger.Error("make session", "peer", remote, "err", err)
		return false
	}
	in := &inboundTrunk{pod: p, hs: hs, local: local, remote: remote, src: src}
	w := t.workers[int(t.spread.Add(1))%len(t.workers)]
	in.w = w
	if !w.Loop.Post(func() {
		if p.gone.Load() {
			refuse(d.fd)
			t.sources.part(src)
			return
		}
		if f := t.revoked(hs); f != nil { // since the handshake
			refuse(d.fd)
			t.sources.part(src)
			t.peerShook(p, remote.Addr(), hs, f)
			return
		}
		trunk, err := w.NewTrunk(d.fd, d.session, in, t.trunkConfig(hs, src))
		if err != nil {
			refuse(d.fd)
			t.sources.part(src)
			t.cfg.Logger.Error("register tunnel connection", "peer", remote, "err", err)
			return
		}
		in.trunk = trunk
		w.inbound[in] = struct{}{}
		w.load.sessions[asServer].Add(1)
	}) {
		refuse(d.fd)
		return false
	}
	return true
}

// inboundTrunk is a trunk that a peer opened.
type inboundTrunk struct {
	pod           *Pod
	w             *worker
	trunk         *relay.Trunk
	hs            *handshake.Result
	local, remote netip.AddrPort
	src           *source
}

// Established is relay.TrunkOwner's.
func (in *inboundTrunk) Established(*relay.Trunk) {
	in.pod.t.peerShook(in.pod, in.remote.Addr(), in.hs, nil)
}

// Closed is relay.TrunkOwner's.
func (in *inboundTrunk) Closed(_ *relay.Trunk, err error) {
	delete(in.w.inbound, in)
	in.w.load.sessions[asServer].Add(-1)
	in.pod.t.sources.part(in.src)
	in.pod.t.ended(in.pod, in.remote.Addr(), err)
}

// Request is relay.TrunkOwner's: a CONNECT.
func (in *inboundTrunk) Request(t *relay.Trunk, st *h2.Stream, fields []hpack.HeaderField) {
	if time.Now().After(in.hs.Peer.Expiry) {
		// Nothing new rests on a certificate whose time is over. The peer may ask
		// again, on a session with its next one; what is open goes on.
		in.pod.t.cfg.Logger.Info("drain tunnel connection: the peer's certificate has expired",
			"workload", in.pod.Key, "peer", in.remote.Addr().String(), "expired", in.hs.Peer.Expiry)
		t.Session().H2.Reset(st, http2.ErrCodeRefusedStream)
		t.Drain()
		return
	}
	if !in.src.account.Open(relay.StreamCost) {
		in.pod.t.limits.streams.Add(1)
		t.Session().H2.Reset(st, http2.ErrCodeRefusedStream)
		return
	}
	snap := in.pod.t.cfg.Snapshots.Load()
	i := &inbound{connection: connection{pod: in.pod, src: in.remote, start: time.Now()}, trunk: in, st: st}
	i.peer, _ = snap.Workloads.ByAddr(in.remote.Addr())
	req, refusal := hbone.ParseRequest(fields)
	if refusal != nil {
		i.dst = in.local
		i.answer(refusal.Status, telemetry.ReasonRefused, refusal.Detail)
		return
	}
	i.dst = req.Authority
	i.trace = req.Trace.ID
	if i.peer == nil {
		i.claimed.Workload, i.claimed.Namespace = claim(req.Baggage, in.hs.Peer.ID)
	}
	if req.Forwarded.Addr() == in.remote.Addr() {
		i.src = req.Forwarded // its port, for the log only
	}
	switch {
	case req.Authority.Addr() != in.local.Addr():
		i.answer(400, telemetry.ReasonRefused, fmt.Sprintf("authority %s is not the address connected to, %s", req.Authority, in.local.Addr()))
		return
	case ownPort(req.Authority.Port()):
		i.answer(503, telemetry.ReasonRefused, fmt.Sprintf("port %d is the tunnel's own", req.Authority.Port()))
		return
	}
	i.verdict = i.ask(snap)
	if !i.verdict.Allow {
		i.answer(401, telemetry.ReasonDenied, i.verdict.Rule)
		return
	}
	if i.gone() { // since it was queued
		return
	}
	i.live.conn = i
	in.w.link(&i.live)
	if !i.done {
		i.delivery = delivery{pod: in.pod, w: in.w, client: in.remote.Addr(), dst: i.dst, to: i}
		i.delivery.start()
	}
}

// inbound is one connection that a peer asked for: the owner of its relay.
type inbound struct {
	connection
	trunk    *inboundTrunk
	st       *h2.Stream
	claimed  struct{ Workload, Namespace string } // of an unknown peer, as its node says
	trace    [16]byte
	relay    *relay.Relay
	delivery delivery
}

// gone is deliverer's.
func (i *inbound) gone() bool {
	if i.done {
		return true
	}
	if detail, yes := relay.Hoarded(i.st); yes {
		i.report(telemetry.ReasonLimit, detail)
	} else if i.st.Closed() || i.trunk.trunk.Closed() {
		i.report(telemetry.ReasonReset, "by the source, before the application was reached")
	}
	return i.done
}

// hold is deliverer's. The first socket makes the relay.
func (i *inbound) hold(fd int) error {
	if i.relay != nil {
		return i.relay.Reconnect(fd)
	}
	r, err := i.trunk.w.Connecting(fd, i)
	if err != nil {
		return err
	}
	i.relay = r
	r.Attach(i.trunk.trunk, i.st)
	return nil
}

// drop is deliverer's.
func (i *inbound) drop() bool { return i.relay == nil || i.relay.Disconnect() }

// holds is deliverer's.
func (i *inbound) holds() bool { return i.relay != nil && !i.relay.Disconnected() }

// established is deliverer's.
func (i *inbound) established() { i.relay.Established() }

// undeliverable is deliverer's.
func (i *inbound) undeliverable(why telemetry.Reason, detail string) { i.answer(503, why, detail) }

// Connected is relay.Owner's.
func (i *inbound) Connected(r *relay.Relay, err error) {
	i.delivery.stop()
	if err != nil {
		i.delivery.unreachable(err)
		return
	}
	if i.respond(hbone.ResponseFields(200, ""), false) {
		i.open(i.record())
		r.Open()
	}
}

func (i *inbound) respond(fields []hpack.HeaderField, end bool) bool {
	t := i.trunk.trunk
	err := t.Session().H2.Respond(i.st, fields, end)
	t.Send()
	if err != nil {
		i.reason, i.detail = telemetry.ReasonReset, err.Error()
		if i.relay != nil {
			i.relay.Abort(http2.ErrCodeCancel, i.detail)
		}
		return false
	}
	return true
}

// answer refuses the stream.
func (i *inbound) answer(status int, why telemetry.Reason, detail string) {
	i.reason, i.detail = why, detail
	if i.st.Closed() || i.trunk.trunk.Closed() {
		i.report(why, detail)
		return
	}
	// The answer ends our half; the reset says that we want no more of the
	// other (RFC 9113, section 8.1).
	if !i.respond(hbone.ResponseFields(status, string(why)), true) {
		if i.relay == nil { // else it has been aborted
			i.trunk.trunk.Session().H2.Reset(i.st, http2.ErrCodeCancel)
			i.report(i.reason, i.detail)
		}
		return
	}
	if i.relay != nil {
		i.relay.Abort(http2.ErrCodeNo, detail)
		return
	}
	i.trunk.trunk.Session().H2.Reset(i.st, http2.ErrCodeNo)
	i.report(why, detail)
}

// Response is relay.Owner's; only we answer.
func (i *inbound) Response(*relay.Relay, []hpack.HeaderField) {}

// Refused is relay.Owner's: the peer took its request back.
func (i *inbound) Refused(r *relay.Relay) {
	i.reason, i.detail = telemetry.ReasonReset, "taken back by the source"
	r.Abort(http2.ErrCodeCancel, i.detail)
}

// Closed is relay.Owner's.
func (i *inbound) Closed(_ *relay.Relay, end relay.End, detail string) {
	i.delivery.stop()
	i.report(i.outcome(end, detail, "destination", "source"))
}

func (i *inbound) report(why telemetry.Reason, detail string) {
	if !i.done {
		i.trunk.src.account.Close(relay.StreamCost)
		i.finish(i.seen(), why, detail)
	}
}

// record is what is known of the connection.
func (i *inbound) record() *telemetry.Connection {
	in := i.trunk
	c := &telemetry.Connection{
		Pod:            i.pod.Key,
		Direction:      policy.Inbound,
		Src:            telemetry.Endpoint{Addr: i.src, Identity: in.hs.Peer.ID},
		Dst:            telemetry.Endpoint{Addr: i.dst, Workload: i.pod.Name, Namespace: i.pod.Namespace, Identity: i.pod.Identity},
		Start:          i.start,
		TLSVersion:     tls.VersionTLS13,
		CipherSuite:    in.hs.CipherSuite,
		Group:          in.hs.Group,
		SecurityPolicy: telemetry.MutualTLS,
		Rule:           i.verdict.Rule,
		PolicyVersion:  i.verdict.Version,
		Trace:          i.trace,
	}
	if i.peer != nil {
		c.Src.Workload, c.Src.Namespace = i.peer.Name, i.peer.Namespace
	} else if i.claimed.Workload != "" {
		c.Src.Workload, c.Src.Namespace, c.Src.Claimed = i.claimed.Workload, i.claimed.Namespace, true
	}
	return c
}
