// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/snapshot"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// A client that has gone without a word holds two sockets. The application's own
// keepalive is answered by us, so ours has to find out: after a minute and a half.
const (
	keepAliveIdle     = 60 // seconds
	keepAliveInterval = 10 // seconds
	keepAliveProbes   = 3
)

// ServePlain takes over a listener for plaintext from outside (PERMISSIVE). What
// is accepted inherits its options.
func (p *Pod) ServePlain(fd int) error {
	for _, o := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.SOL_TCP, unix.TCP_KEEPIDLE, keepAliveIdle},
		{unix.SOL_TCP, unix.TCP_KEEPINTVL, keepAliveInterval},
		{unix.SOL_TCP, unix.TCP_KEEPCNT, keepAliveProbes},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("set keepalive of the listener for plaintext: %w", err)
		}
	}
	return p.serve(fd, p.acceptPlain, p.plainNone)
}

// acceptPlain takes a connection in plaintext. It runs on the loop of the pod's
// listeners.
func (p *Pod) acceptPlain(fd int) {
	t := p.t
	dst, src, ok := ends(fd) // getsockname is whom the client called
	if !ok {
		unix.Close(fd) // gone already
		return
	}
	c := &plain{connection: connection{pod: p, src: src, dst: dst, start: time.Now()}}
	snap := t.cfg.Snapshots.Load()
	c.peer, _ = snap.Workloads.ByAddr(src.Addr())
	if ownPort(dst.Port()) {
		c.refuse(fd, telemetry.ReasonRefused, fmt.Sprintf("port %d is the tunnel's own", dst.Port()))
		return
	}
	c.verdict = c.ask(snap)
	if !c.verdict.Allow {
		// The map that steers is a little behind or ahead of the snapshot.
		c.refuse(fd, telemetry.ReasonDenied, c.verdict.Rule)
		return
	}
	if err := c.enter(); err != nil {
		c.refuse(fd, telemetry.ReasonLimit, err.Error())
		return
	}
	c.w = t.workers[int(t.spread.Add(1))%len(t.workers)]
	if !c.w.Loop.Post(func() { c.begin(fd) }) {
		c.leave()
		c.refuse(fd, telemetry.ReasonDraining, errClosed.Error())
	}
}

// plainNone refuses a connection in plaintext, for want of descriptors.
func (p *Pod) plainNone(fd int) {
	dst, src, ok := ends(fd)
	if !ok {
		unix.Close(fd)
		return
	}
	c := &plain{connection: connection{pod: p, src: src, dst: dst, start: time.Now()}}
	c.peer, _ = p.t.cfg.Snapshots.Load().Workloads.ByAddr(src.Addr())
	c.refuse(fd, telemetry.ReasonLimit, errNoDescriptors.Error())
}

// plain is one connection in plaintext: the owner of its pipe.
type plain struct {
	connection
	w        *worker
	source   *source
	pipe     *relay.Pipe
	delivery delivery
}

// begin goes on, on the loop that the connection belongs to.
func (c *plain) begin(fd int) {
	if c.pod.gone.Load() { // removed since; nobody would end it
		c.leave()
		c.refuse(fd, telemetry.ReasonDraining, errPodGone.Error())
		return
	}
	pipe, err := c.w.Piping(fd, c)
	if err != nil {
		c.leave()
		c.refuse(fd, telemetry.ReasonLimit, err.Error())
		return
	}
	c.pipe = pipe
	c.w.plain[c] = struct{}{}
	c.live.conn = c
	c.w.link(&c.live)
	if c.done {
		return
	}
	c.delivery = delivery{pod: c.pod, w: c.w, client: c.src.Addr(), dst: c.dst, to: c}
	c.delivery.start()
}

// enter counts the connection in, as long as there may be more of them; leave
// counts it out.
func (c *plain) enter() (err error) {
	if c.source, err = c.pod.t.sources.enter(c.src.Addr()); err != nil {
		return err
	}
	c.pod.tuples.hold(c.tuple())
	return nil
}

func (c *plain) leave() {
	c.pod.t.sources.leave(c.source)
	c.pod.tuples.drop(c.tuple())
}

// refuse ends a connection that has no pipe yet.
func (c *plain) refuse(fd int, why telemetry.Reason, detail string) {
	refuse(fd)
	c.report(why, detail)
}

// fail resets both ends.
func (c *plain) fail(why telemetry.Reason, detail string) {
	c.reason, c.detail = why, detail
	c.pipe.Abort(detail)
}

// gone is deliverer's.
func (c *plain) gone() bool { return c.done }

// hold is deliverer's.
func (c *plain) hold(fd int) error { return c.pipe.Connect(fd) }

// drop is deliverer's.
func (c *plain) drop() bool { return c.pipe.Disconnect() }

// holds is deliverer's.
func (c *plain) holds() bool { return !c.pipe.Disconnected() }

// established is deliverer's.
func (c *plain) established() { c.pipe.Established() }

// undeliverable is deliverer's.
func (c *plain) undeliverable(why telemetry.Reason, detail string) { c.fail(why, detail) }

// PipeConnected is relay.PipeOwner's.
func (c *plain) PipeConnected(p *relay.Pipe, err error) {
	c.delivery.stop()
	if err != nil {
		c.delivery.unreachable(err)
		return
	}
	c.open(c.record())
	p.Open()
}

// PipeClosed is relay.PipeOwner's.
func (c *plain) PipeClosed(_ *relay.Pipe, end relay.End, detail string) {
	c.delivery.stop()
	c.leave()
	delete(c.w.plain, c)
	c.report(c.outcome(end, detail, "destination", "source"))
}

func (c *plain) report(why telemetry.Reason, detail string) { c.finish(c.seen(), why, detail) }

// record is what is known of the connection. Who the source is, its address says,
// and nothing proves.
func (c *plain) record() *telemetry.Connection {
	r := &telemetry.Connection{
		Pod:            c.pod.Key,
		Direction:      policy.Inbound,
		Src:            telemetry.Endpoint{Addr: c.src},
		Dst:            telemetry.Endpoint{Addr: c.dst, Workload: c.pod.Name, Namespace: c.pod.Namespace, Identity: c.pod.Identity},
		Start:          c.start,
		SecurityPolicy: telemetry.Plaintext,
		Rule:           c.verdict.Rule,
		PolicyVersion:  c.verdict.Version,
	}
	if c.peer != nil {
		r.Src.Workload, r.Src.Namespace = c.peer.Name, c.peer.Namespace
	}
	return r
}

// seen is the record with what has been moved by now.
func (c *plain) seen() *telemetry.Connection {
	r := c.record()
	r.FromClient, r.ToClient = c.moved()
	return r
}

// moved is how many bytes have come from the client, and how many gone to it.
func (c *plain) moved() (fromClient, toClient uint64) {
	if c.pipe == nil {
		return 0, 0
	}
	return c.pipe.FromClient(), c.pipe.ToClient()
}

func (c *plain) count() { c.flow.Progress(c.moved()) }

func (c *plain) tuple() tuple { return tuple{client: c.src, local: c.dst} }

// recheck ends what may not be any more, such as where the port is STRICT by now.
func (c *plain) recheck(s *snapshot.Snapshot) {
	c.verdict = c.ask(s)
	if !c.verdict.Allow {
		c.fail(telemetry.ReasonDenied, c.verdict.Rule)
	}
}

// ask asks a snapshot whether the connection may be.
func (c *plain) ask(s *snapshot.Snapshot) policy.Verdict {
	return s.AuthorizePlain(c.pod.Namespace, c.pod.Name, policy.Conn{Dir: policy.Inbound, Src: c.src, Dst: c.dst, DstID: c.pod.Identity})
}
