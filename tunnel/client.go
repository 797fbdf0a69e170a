// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"syscall"
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
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/relay"
	"github.com/culvert-mesh/culvert/tunnel/session"
	"github.com/culvert-mesh/culvert/workload"
)

// capture takes a connection that the pod opened. It runs on the loop of the
// pod's listeners.
func (p *Pod) capture(fd int) {
	t := p.t
	dst, src, ok := ends(fd) // getsockname is where the application wanted to go
	if !ok {
		unix.Close(fd) // gone already
		return
	}
	snap := t.cfg.Snapshots.Load()
	o := &outbound{connection: connection{pod: p, src: src, dst: dst, start: time.Now()}, trace: newTrace()}
	peer, ok := snap.Workloads.ByAddr(dst.Addr())
	if !ok && t.cfg.Probe != nil && t.cfg.Probe(dst.Addr()) {
		refuse(fd)
		return
	}
	if !ok || peer.Protocol != workload.HBONE {
		// The maps that steer are a little behind or ahead of the snapshot.
		o.refuse(fd, telemetry.ReasonUnknownDestination, "no workload of the mesh has this address")
		return
	}
	o.peer = peer
	o.verdict = o.ask(snap)
	if !o.verdict.Allow {
		o.refuse(fd, telemetry.ReasonDenied, o.verdict.Rule)
		return
	}
	key := poolKey{pod: p, dst: dst.Addr(), id: peer.Identity()}
	home := t.home(key)
	o.home = home
	take := func() {
		if p.gone.Load() { // removed since; an entry made now would outlive it
			o.refuse(fd, telemetry.ReasonDraining, errPodGone.Error())
			return
		}
		r, err := home.Waiting(fd, o)
		if err != nil {
			o.refuse(fd, telemetry.ReasonLimit, err.Error())
			return
		}
		o.relay = r
		o.live.conn = o
		home.link(&o.live)
		if o.done {
			return
		}
		o.entry = home.entry(key)
		o.entry.assign(o)
	}
	if home == p.w {
		take()
	} else if !home.Loop.Post(take) {
		o.refuse(fd, telemetry.ReasonDraining, errClosed.Error())
	}
}

// captureNone refuses a connection that the pod opened, for want of descriptors.
func (p *Pod) captureNone(fd int) {
	dst, src, ok := ends(fd)
	if !ok {
		unix.Close(fd)
		return
	}
	o := &outbound{connection: connection{pod: p, src: src, dst: dst, start: time.Now()}, trace: newTrace()}
	if peer, ok := p.t.cfg.Snapshots.Load().Workloads.ByAddr(dst.Addr()); ok {
		o.peer = peer
	}
	o.refuse(fd, telemetry.ReasonLimit, errNoDescriptors.Error())
}

// outbound is one connection that a pod opened: the owner of its relay.
type outbound struct {
	connection
	trace    hbone.Trace
	home     *worker
	entry    *entry
	relay    *relay.Relay
	via      *clientTrunk
	attempts int
}

func (o *outbound) fields() []hpack.HeaderField {
	return hbone.Request{
		Authority: o.dst,
		Baggage:   hbone.Baggage{Namespace: o.pod.Namespace, Pod: o.pod.Name},
		Forwarded: o.src,
		Trace:     o.trace,
	}.Fields()
}

// newTrace begins a trace, by which the records of both ends can be joined. What
// the application may have of its own is in its bytes, which are not ours to read.
func newTrace() (t hbone.Trace) {
	binary.NativeEndian.PutUint64(t.ID[:], rand.Uint64()|1) // all zeros would be none
	binary.NativeEndian.PutUint64(t.ID[8:], rand.Uint64())
	binary.NativeEndian.PutUint64(t.Parent[:], rand.Uint64()|1)
	return t
}

// refuse ends a connection that has no relay yet.
func (o *outbound) refuse(fd int, why telemetry.Reason, detail string) {
	refuse(fd)
	o.report(why, detail)
}

// fail aborts the relay.
func (o *outbound) fail(why telemetry.Reason, detail string) {
	o.reason, o.detail = why, detail
	o.relay.Abort(http2.ErrCodeCancel, detail)
}

// lost is for an error before there is a relay to end.
func (o *outbound) lost(err error) { o.report(telemetry.ReasonLimit, err.Error()) }

func (o *outbound) dialFailed(err error) {
	if o.done {
		return
	}
	why, detail := dialReason(err)
	o.fail(why, detail)
}

// Connected is relay.Owner's; the application connected to us.
func (o *outbound) Connected(*relay.Relay, error) {}

// Response is relay.Owner's.
func (o *outbound) Response(r *relay.Relay, fields []hpack.HeaderField) {
	status, reason, err := hbone.ParseResponse(fields)
	switch {
	case err != nil:
		o.fail(telemetry.ReasonTunnelLost, err.Error())
	case status == 200:
		o.open(o.record())
		r.Open()
	default:
		o.fail(refusalReason(status, reason), refusalDetail(status, reason))
	}
}

// Refused is relay.Owner's.
func (o *outbound) Refused(*relay.Relay) {
	if o.attempts++; o.attempts == maxAttempts {
		o.fail(telemetry.ReasonTunnelLost, "the peer refused the stream on several tunnel connections")
		return
	}
	via := o.via
	o.reassign(func() { via.unusable = true })
}

// reassign brings the relay back to the entry's loop and tries another trunk.
func (o *outbound) reassign(first func()) {
	if o.via.w == o.home {
		first()
		o.home.Loop.After(0, func() {
			if !o.done {
				o.entry.assign(o)
			}
		})
		return
	}
	o.home.Loop.Post(first)
	o.move(o.home, func() { o.entry.assign(o) })
}

// move takes the relay, which has no stream, from the loop that it is on to another,
// and goes on there with then.
func (o *outbound) move(to *worker, then func()) {
	o.live.unlink()
	fd := o.relay.Detach()
	if !to.Loop.Post(func() {
		r, err := to.Waiting(fd, o)
		if err != nil {
			refuse(fd)
			o.lost(err)
			return
		}
		o.relay = r
		to.link(&o.live)
		if !o.done {
			then()
		}
	}) {
		refuse(fd)
	}
}

// Closed is relay.Owner's.
func (o *outbound) Closed(r *relay.Relay, end relay.End, detail string) {
	if end == relay.EndTrunkLost && o.via.failure != nil {
		detail = o.via.failure.Error()
	}
	o.report(o.outcome(end, detail, "source", "destination"))
}

func (o *outbound) report(why telemetry.Reason, detail string) {
	if !o.done {
		o.finish(o.seen(), why, detail)
	}
}

// record is what is known of the connection.
func (o *outbound) record() *telemetry.Connection {
	c := &telemetry.Connection{
		Pod:           o.pod.Key,
		Direction:     policy.Outbound,
		Src:           telemetry.Endpoint{Addr: o.src, Workload: o.pod.Name, Namespace: o.pod.Namespace, Identity: o.pod.Identity},
		Dst:           telemetry.Endpoint{Addr: o.dst},
		Start:         o.start,
		Rule:          o.verdict.Rule,
		PolicyVersion: o.verdict.Version,
		Trace:         o.trace.ID,
	}
	if o.peer != nil {
		c.Dst.Workload, c.Dst.Namespace = o.peer.Name, o.peer.Namespace
	}
	if o.via != nil {
		c.Dst.Identity = o.via.hs.Peer.ID // proven
		c.TLSVersion, c.CipherSuite, c.Group = tls.VersionTLS13, o.via.hs.CipherSuite, o.via.hs.Group
		c.SecurityPolicy = telemetry.MutualTLS
	}
	return c
}

// dialled is a tunnel connection, ready for a loop.
type dialled struct {
	fd      int
	session *session.Session
	hs      *handshake.Result
}

// dial opens a tunnel connection: from the pod's own address, to the peer's,
// with the pod's identity. It runs in a goroutine of its own.
func (t *Tunnel) dial(k poolKey) (*dialled, error) {
	ctx, cancel := context.WithTimeout(k.pod.ctx, t.cfg.ConnectTimeout+t.cfg.HandshakeTimeout)
	defer cancel()
	svid, err := t.cfg.Identity.SVID(ctx, k.pod.Identity)
	if err != nil {
		var f *identity.Failure
		if errors.As(err, &f) { // our own certificate's time is over
			t.dialShook(k, nil, f)
		}
		return nil, &issuanceError{err}
	}
	wait, ok := t.pauses.next(k.dst, time.Now())
	if !ok {
		t.limits.paused.Add(1)
		return nil, &pausedError{wait}
	}
	if !sleep(ctx, wait) {
		return nil, context.Cause(ctx)
	}
	fd, err := k.pod.Sockets.Dial(k.dst)
	if err != nil {
		return nil, err
	}
	if t.scarce(fd) {
		unix.Close(fd)
		t.limits.descriptors.Add(1)
		return nil, fmt.Errorf("%w: %w", errNoDescriptors, unix.EMFILE)
	}
	remote := netip.AddrPortFrom(k.dst, HBONEPort)
	c, err := connect(ctx, fd, remote, t.cfg.ConnectTimeout)
	if err != nil {
		return nil, noTunnel(err)
	}
	hs, err := handshake.Client(ctx, c, handshake.Config{SVID: svid, Verifier: t.verifier(), Expect: k.id, Timeout: t.cfg.HandshakeTimeout, Turn: t.turns.of(k.dst)})
	if err != nil {
		var f *identity.Failure
		if errors.As(err, &f) {
			t.dialShook(k, nil, f)
		}
		// Who waits for the dial does not wait for this.
		if !k.pod.start(func() { c.part(k.pod.ctx) }) {
			c.Close()
		}
		return nil, err
	}
	return newSession(c, hs, h2.Config{Client: true})
}

// noTunnel adds the likely cause and the mend to the error of a dial.
func noTunnel(err error) error {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%w: the destination has no tunnel: enrol its pod at its node, or have the workload say protocol: tcp", err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w: nobody answers: look at the workload's address, and at the network's way to this port", err)
	}
	return err
}

// newSession makes a session of a connection whose handshake is over, and
// takes the descriptor.
func newSession(c *netConn, hs *handshake.Result, cfg h2.Config) (*dialled, error) {
	layer, err := record.New(hs.Secrets)
	if err != nil {
		c.Close()
		return nil, err
	}
	fd, err := c.take()
	if err != nil {
		return nil, err
	}
	return &dialled{fd: fd, session: session.New(layer, h2.New(cfg), hs.Leftover), hs: hs}, nil
}

// issuanceError says that the pod itself has no certificate.
type issuanceError struct{ err error }

func (e *issuanceError) Error() string { return "no certificate for this workload: " + e.err.Error() }
func (e *issuanceError) Unwrap() error { return e.err }

// dialReason is the connection's reason for a dial's error.
func dialReason(err error) (telemetry.Reason, string) {
	var f *identity.Failure
	var paused *pausedError
	var errno syscall.Errno
	switch {
	case errors.As(err, &f):
		return telemetry.ReasonTunnelLost, f.Error()
	case errors.As(err, &paused):
		return telemetry.ReasonTunnelLost, paused.Error()
	case errors.Is(err, errMoved):
		return telemetry.ReasonUnknownDestination, err.Error()
	case errors.Is(err, errPodGone), errors.Is(err, errClosed), errors.Is(err, context.Canceled):
		return telemetry.ReasonDraining, err.Error()
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return telemetry.ReasonTimeout, err.Error()
	case errors.As(err, &errno):
		return errnoReason(errno), err.Error()
	}
	return telemetry.ReasonUnreachable, err.Error()
}

func errnoReason(e syscall.Errno) telemetry.Reason {
	switch e {
	case unix.ECONNREFUSED, unix.ECONNRESET:
		return telemetry.ReasonRefused
	case unix.ETIMEDOUT:
		return telemetry.ReasonTimeout
	case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EADDRINUSE, unix.EADDRNOTAVAIL:
		return telemetry.ReasonLimit
	}
	return telemetry.ReasonUnreachable
}
