// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/snapshot"
	"github.com/culvert-mesh/culvert/telemetry"
)

// recheckShare is how many connections one turn of a loop asks a new snapshot
// about: some 50 us of work, so that the others' bytes do not wait for it.
const recheckShare = 256

// liveConnection is a connection of any kind.
type liveConnection interface {
	// version is that of the snapshot that the connection rests on.
	version() uint64
	// recheck ends the connection if it may not be by s, else it rests on s from
	// then on.
	recheck(s *snapshot.Snapshot)
	// seen is its record as it is now.
	seen() *telemetry.Connection
	// count counts the bytes that it has moved by now.
	count()
	// kind is what its loop counts it as.
	kind() int
}

// live is a connection's place in the list of the worker on whose loop its
// relay is. A new snapshot goes through that list.
type live struct {
	conn       liveConnection
	on         *worker // nil: in no list
	prev, next *live
}

// lives is a worker's list of connections, newest first.
type lives struct {
	head   *live
	cursor *live              // the next to be asked about
	snap   *snapshot.Snapshot // what they are asked about
	asking bool

	walks map[*walk]struct{} // those under way
}

// link adds a connection. A snapshot that has come since it was decided may end
// it at once: look at done after. The loop may not have been told of that one yet.
func (w *worker) link(l *live) {
	l.on, l.prev, l.next = w, nil, w.lives.head
	if l.next != nil {
		l.next.prev = l
	}
	w.lives.head = l
	w.load.connections[l.conn.kind()].Add(1)
	if s := w.t.cfg.Snapshots.Load(); l.conn.version() < s.Version {
		l.conn.recheck(s)
	}
}

// unlink takes a connection out, when it ends or goes to another loop.
func (l *live) unlink() {
	w := l.on
	if w == nil {
		return
	}
	w.load.connections[l.conn.kind()].Add(-1)
	if w.lives.cursor == l {
		w.lives.cursor = l.next
	}
	for k := range w.lives.walks {
		if k.cursor == l {
			k.cursor = l.next
		}
	}
	if l.prev != nil {
		l.prev.next = l.next
	} else {
		w.lives.head = l.next
	}
	if l.next != nil {
		l.next.prev = l.prev
	}
	l.on, l.prev, l.next = nil, nil, nil
}

// follow has each loop recheck its connections at each new snapshot.
func (t *Tunnel) follow() {
	for {
		changed := t.cfg.Snapshots.Changed()
		snap := t.cfg.Snapshots.Load()
		for _, w := range t.workers {
			w.Loop.Post(func() { w.recheck(snap) })
		}
		select {
		case <-changed:
		case <-t.ctx.Done():
			return
		}
	}
}

// recheck begins to go through the worker's connections, again from the first
// where it is at it for an older snapshot.
func (w *worker) recheck(snap *snapshot.Snapshot) {
	if w.lives.snap != nil && snap.Version <= w.lives.snap.Version {
		return
	}
	w.lives.snap, w.lives.cursor = snap, w.lives.head
	w.retire(snap)
	if !w.lives.asking {
		w.lives.asking = true
		w.ask()
	}
}

// ask is one turn's share of a recheck.
func (w *worker) ask() {
	for range recheckShare {
		l := w.lives.cursor
		if l == nil {
			w.lives.asking = false
			return
		}
		w.lives.cursor = l.next
		if l.conn.version() < w.lives.snap.Version {
			l.conn.recheck(w.lives.snap)
		}
	}
	w.Loop.After(0, w.ask)
}

// errMoved ends the tunnel connections to an address that is another's by now.
var errMoved = errors.New("the address is no longer this workload's")

// retire takes no new streams to workloads that are no longer where they were.
// Each connection is ended by its own recheck, so that it is told why, and the
// tunnel connection ends with the last of them.
func (w *worker) retire(snap *snapshot.Snapshot) {
	for k, e := range w.entries {
		if peer, ok := snap.Workloads.ByAddr(k.dst); !ok || peer.Identity() != k.id {
			e.retire()
		}
	}
}

func (e *entry) retire() {
	e.closed = errMoved
	delete(e.w.entries, e.key)
	e.w.retired[e] = struct{}{}
	for _, c := range e.trunks {
		c.drain()
	}
	e.forget()
}

func (o *outbound) recheck(s *snapshot.Snapshot) {
	peer, ok := s.Workloads.ByAddr(o.dst.Addr())
	if !ok {
		o.fail(telemetry.ReasonUnknownDestination, "no workload of the mesh has this address any more")
		return
	}
	if peer.Identity() != o.peer.Identity() {
		o.fail(telemetry.ReasonUnknownDestination, "the address is that of "+peer.Identity().String()+" by now")
		return
	}
	o.peer = peer
	o.verdict = o.ask(s)
	if !o.verdict.Allow {
		o.fail(telemetry.ReasonDenied, o.verdict.Rule)
	}
}

// ask asks a snapshot whether the connection may be.
func (o *outbound) ask(s *snapshot.Snapshot) policy.Verdict {
	return s.Authorize(policy.Conn{Dir: policy.Outbound, Src: o.src, Dst: o.dst, SrcID: o.pod.Identity, DstID: o.peer.Identity()})
}

func (i *inbound) recheck(s *snapshot.Snapshot) {
	i.verdict = i.ask(s)
	switch {
	case i.verdict.Allow:
	case i.opened:
		i.reason, i.detail = telemetry.ReasonDenied, i.verdict.Rule
		i.relay.Abort(http2.ErrCodeCancel, i.detail)
	default:
		i.answer(401, telemetry.ReasonDenied, i.verdict.Rule)
	}
}

// ask asks a snapshot whether the connection may be.
func (i *inbound) ask(s *snapshot.Snapshot) policy.Verdict {
	in := i.trunk
	return s.Authorize(policy.Conn{Dir: policy.Inbound, Src: i.src, Dst: i.dst, SrcID: in.hs.Peer.ID, DstID: in.pod.Identity})
}
