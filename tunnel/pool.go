// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/handshake"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// poolKey is what a connection between two pods is kept under. A pod that was
// replaced is another *Pod, and an address that was reused has another
// identity, so that neither meets a stale tunnel.
type poolKey struct {
	pod *Pod       // and so the identity we present
	dst netip.Addr // the peer's address
	id  spiffeid.ID
}

// maxTrunks is how many connections that take new streams one pair of pods may
// have. Those that drain do not count: each of them carries something that was
// opened, perhaps for longer than many certificates live.
const maxTrunks = 8

// maxAttempts is how often a connection that the peer has not processed is
// tried on another tunnel connection.
const maxAttempts = 3

// entry has the tunnel connections of one key. It belongs to the loop that its
// key hashes to, and so does its one dial; a sibling's trunk may live on
// another loop.
type entry struct {
	w       *worker
	key     poolKey
	trunks  []*clientTrunk
	waiting []*outbound // for the dial
	dialing bool
	closed  error
}

// clientTrunk is a trunk that we opened.
type clientTrunk struct {
	e     *entry
	w     *worker // its loop, perhaps not the entry's
	trunk *relay.Trunk
	hs    *handshake.Result
	src   *source // the server

	// Of the entry's loop.
	unusable bool // draining or closed: takes no new streams

	// Of the trunk's loop.
	established bool
	failure     *identity.Failure // the peer refused our certificate
}

func (w *worker) entry(k poolKey) *entry {
	e := w.entries[k]
	if e == nil {
		e = &entry{w: w, key: k}
		w.entries[k] = e
	}
	return e
}

// assign finds a tunnel connection for o, whose relay waits, or opens one.
func (e *entry) assign(o *outbound) {
	if e.closed != nil {
		o.dialFailed(e.closed)
		return
	}
	now := e.w.Loop.Now()
	best, usable := e.choose(now)
	// Beside an elephant a small request waits: open a sibling, on another
	// loop where there is one.
	if best == nil || (best.trunk.Elephant(now) && usable < maxTrunks) {
		if usable >= maxTrunks {
			o.fail(telemetry.ReasonLimit, "every tunnel connection to the peer is full")
			return
		}
		e.waiting = append(e.waiting, o)
		e.dial()
		return
	}
	best.carry(o)
}

// choose returns the tunnel connection that is to carry what comes next, or nil,
// and how many take new streams. Those whose peer's time is over are drained.
func (e *entry) choose(now time.Time) (best *clientTrunk, usable int) {
	for _, c := range e.trunks {
		if !c.unusable && now.After(c.hs.Peer.Expiry) { // nothing new rests on it
			c.drain()
		}
		if !c.unusable {
			usable++
		}
		if c.unusable || c.trunk.Full() || (best != nil && best.trunk.Streams() <= c.trunk.Streams() && !best.trunk.Elephant(now)) {
			continue
		}
		if best == nil || !c.trunk.Elephant(now) {
			best = c
		}
	}
	return best, usable
}

// drain gives c no new streams and closes it after its last. It runs on the
// entry's loop.
func (c *clientTrunk) drain() {
	c.unusable = true
	if c.w == c.e.w {
		c.trunk.Drain()
	} else {
		c.w.Loop.Post(func() { c.trunk.Drain() })
	}
}

// close ends c and resets its streams. It runs on the entry's loop.
func (c *clientTrunk) close(err error) {
	c.unusable = true
	if c.w == c.e.w {
		c.trunk.Close(err)
	} else {
		c.w.Loop.Post(func() { c.trunk.Close(err) })
	}
}

// carry opens a stream for o, on the trunk's own loop.
func (c *clientTrunk) carry(o *outbound) {
	o.via = c
	if c.w == c.e.w {
		c.open(o)
		return
	}
	o.move(c.w, func() { c.open(o) })
}

func (c *clientTrunk) open(o *outbound) {
	if err := c.trunk.Open(o.relay, o.fields()); err != nil {
		c.notCarried(o, err)
	}
}

// notCarried sends o back to its entry to be assigned again.
func (c *clientTrunk) notCarried(o *outbound, err error) {
	full := errors.Is(err, h2.ErrStreamLimit) // then trunk.Full says so
	o.reassign(func() { c.unusable = c.unusable || !full })
}

// dial opens one more tunnel connection for those who wait. There is one dial
// at a time.
func (e *entry) dial() {
	if e.dialing {
		return
	}
	e.dialing = true
	t := e.w.t
	w := t.workers[(e.w.index+len(e.trunks))%len(t.workers)]
	if !e.key.pod.start(func() {
		d, err := t.dial(e.key)
		if err != nil {
			e.w.Loop.Post(func() { e.dialed(nil, err) })
			return
		}
		c := &clientTrunk{e: e, w: w, hs: d.hs, src: t.sources.take(e.key.dst)}
		if !w.Loop.Post(func() {
			trunk, err := w.NewTrunk(d.fd, d.session, c, t.trunkConfig(d.hs, c.src))
			if err != nil {
				refuse(d.fd)
				t.sources.drop(c.src)
				e.w.Loop.Post(func() { e.dialed(nil, err) })
				return
			}
			c.trunk = trunk
			w.load.sessions[asClient].Add(1)
			e.w.Loop.Post(func() { e.dialed(c, nil) })
		}) {
			refuse(d.fd)
			t.sources.drop(c.src)
		}
	}) {
		e.dialed(nil, errPodGone)
	}
}

// dialed ends a dial: those who waited are carried, or told why not.
func (e *entry) dialed(c *clientTrunk, err error) {
	e.dialing = false
	waiting := e.waiting
	e.waiting = nil
	if err == nil && e.closed != nil {
		c.close(e.closed)
		err = e.closed
	}
	if err == nil {
		if f := e.w.t.revoked(c.hs); f != nil { // since the handshake
			c.close(f)
			err = f
		}
	}
	if err != nil {
		for _, o := range waiting {
			o.dialFailed(err)
		}
		e.forget()
		return
	}
	e.trunks = append(e.trunks, c)
	for _, o := range waiting {
		if o.relay.Trunk() == nil && !o.done {
			if c.unusable || c.trunk.Full() {
				e.assign(o)
			} else {
				c.carry(o)
			}
		}
	}
}

// remove takes a trunk out that has ended.
func (e *entry) remove(c *clientTrunk) {
	e.trunks = slices.DeleteFunc(e.trunks, func(x *clientTrunk) bool { return x == c })
	e.forget()
}

// forget drops the entry when nothing is left of it.
func (e *entry) forget() {
	if len(e.trunks) == 0 && len(e.waiting) == 0 && !e.dialing {
		delete(e.w.retired, e)
		if e.w.entries[e.key] == e {
			delete(e.w.entries, e.key)
		}
	}
}

// close ends the entry's tunnel connections.
func (e *entry) close(err error) {
	e.closed = err
	waiting := e.waiting
	e.waiting = nil
	for _, o := range waiting {
		o.fail(telemetry.ReasonDraining, err.Error())
	}
	for _, c := range slices.Clone(e.trunks) {
		c.close(err)
	}
	e.forget()
}

// Established is relay.TrunkOwner's: the peer has accepted our certificate.
func (c *clientTrunk) Established(*relay.Trunk) {
	c.established = true
	c.e.key.pod.t.dialShook(c.e.key, c.hs, nil)
}

// Request is relay.TrunkOwner's. A server opens no streams.
func (c *clientTrunk) Request(t *relay.Trunk, st *h2.Stream, _ []hpack.HeaderField) {
	t.Session().H2.Reset(st, http2.ErrCodeProtocol)
}

// Closed is relay.TrunkOwner's.
func (c *clientTrunk) Closed(_ *relay.Trunk, err error) {
	c.w.load.sessions[asClient].Add(-1)
	c.e.key.pod.t.sources.drop(c.src)
	c.e.key.pod.t.ended(c.e.key.pod, c.e.key.dst, err)
	var alert *record.PeerAlert
	if !c.established && errors.As(err, &alert) {
		c.failure = handshake.FromAlert(alert)
		c.e.key.pod.t.dialShook(c.e.key, c.hs, c.failure)
	}
	if c.w == c.e.w {
		c.unusable = true
		c.e.remove(c)
		return
	}
	c.e.w.Loop.Post(func() { c.unusable = true; c.e.remove(c) })
}
