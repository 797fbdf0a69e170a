// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"io"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/session"
)

// Errors with which a trunk ends, besides those of tunnel/session and of its
// socket.
var (
	ErrTruncated = errors.New("tunnel connection closed without close_notify")
	ErrDead      = errors.New("peer does not answer")
	ErrIdle      = errors.New("idle")
	ErrDrained   = errors.New("drained")
	ErrUnread    = errors.New("peer does not read")
	ErrUnsealed  = errors.New("the record layer seals nothing any more")
)

// TrunkOwner is told of a trunk's life, on the loop's thread.
type TrunkOwner interface {
	// Established is called at the peer's first record: only then is it
	// known that it accepted our certificate.
	Established(t *Trunk)
	// Request is called for a stream that the peer opened. It may be closed
	// again by then.
	Request(t *Trunk, st *h2.Stream, fields []hpack.HeaderField)
	// Closed is called once, before the relays are ended.
	Closed(t *Trunk, err error)
}

// TrunkConfig has a trunk's time limits. Zero means never.
type TrunkConfig struct {
	// Until is when the peer's certificate ends, by the wall clock: from then on
	// the trunk drains. A client hears of it a second before, or in the middle of
	// what is left at the start where that is less than two.
	Until time.Time

	PingAfter time.Duration // silence after which the peer is asked
	DeadAfter time.Duration // silence after which it is given up; longer than PingAfter
	IdleAfter time.Duration // time without streams after which it is closed; a client hears of it a second before

	// Peer is charged with what is queued; nil: an account for this trunk alone.
	Peer *Account
}

// goAwayNotice is how long before a trunk drains its client is told: some round trips
// of any network. A client that takes no REFUSED_STREAM for a reason to try again, as
// Istio's ztunnel, would else reset what it opens meanwhile.
const goAwayNotice = time.Second

// Trunk is a session on its socket.
type Trunk struct {
	w     *Worker
	s     *session.Session
	owner TrunkOwner
	cfg   TrunkConfig
	peer  *Account
	fd    int

	out   writer
	sent  []*batch     // sealed, being written
	iov   []unix.Iovec // what of them is still to be written
	iovs  []unix.Iovec // its memory
	ctl   []byte       // sealed control records in front of them
	small ring
	bulk  ring

	requests []asked // not taken up yet

	relays *Relay // list
	count  int    // of relays
	window int    // a new stream's receive window
	room   int    // what its next read may take

	dirty     bool // in the loop's list of flushes
	unread    bool // the socket may hold more
	sockEnded bool // and reported its end
	alive     bool // the first record came
	mute      bool // its socket takes nothing more: it is read to its end
	closed    bool
	draining  bool // no new streams; closes with the last relay
	announced bool // that it is to drain soon

	notice    time.Time // when the peer is to hear of Until; zero: it has
	lastRead  time.Time
	smallAt   time.Time // when there were small frames to send
	stalled   time.Time // since when its socket takes nothing; zero: it does
	refilled  time.Time // when the peer's budget was
	idleSince time.Time
	tick      *loop.Timer

	pingAt time.Time // when the outstanding RTT ping was sent
	rtt    time.Duration
	rate   float64 // bytes per second of the last elephant

	// Read from other loops by the pool.
	elephant atomic.Int64 // until when, in Unix nanoseconds
	streams  atomic.Int32
	full     atomic.Bool // the peer's limit of streams is met
}

// NewTrunk puts a session on a socket, which the trunk owns from then on.
func (w *Worker) NewTrunk(fd int, s *session.Session, o TrunkOwner, cfg TrunkConfig) (*Trunk, error) {
	now := w.Loop.Now()
	t := &Trunk{w: w, s: s, owner: o, cfg: cfg, fd: fd, window: startWindow, room: leastRead, lastRead: now, idleSince: now}
	if !cfg.Until.IsZero() {
		t.notice = cfg.Until.Add(-min(goAwayNotice, max(0, time.Until(cfg.Until))/2))
	}
	if t.peer = cfg.Peer; t.peer == nil {
		t.peer = w.budget.Account()
	}
	t.out.stock = &w.stock
	s.H2.Share(&w.scratch)
	if err := w.Loop.Register(fd, t); err != nil {
		return nil, err
	}
	w.trunks[t] = struct{}{}
	s.H2.Meter(t.meter)
	_ = unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NOTSENT_LOWAT, notSentLowat) // not TCP in some tests
	t.schedule()
	t.wantFlush()
	if s.Pending() > 0 {
		w.Loop.Again(t)
		t.unread = true
	}
	return t, nil
}

// Session is the trunk's session, for opening and answering streams. After a
// change that is to be sent call Send.
func (t *Trunk) Session() *session.Session { return t.s }

// Send sees to it that what is pending is sent at the end of this turn.
func (t *Trunk) Send() { t.wantFlush() }

// Streams is how many relays the trunk carries. It may be called from
// anywhere.
func (t *Trunk) Streams() int { return int(t.streams.Load()) }

// Elephant reports whether a stream of the trunk moved much lately. It may be
// called from anywhere.
func (t *Trunk) Elephant(now time.Time) bool { return now.UnixNano() < t.elephant.Load() }

// Full reports whether the peer's limit of concurrent streams is met. It may be
// called from anywhere.
func (t *Trunk) Full() bool { return t.full.Load() }

// Open opens a stream for a waiting relay.
func (t *Trunk) Open(r *Relay, fields []hpack.HeaderField) error {
	if t.closed || t.draining {
		return h2.ErrGoingAway
	}
	st, err := t.s.H2.Open(fields, nil)
	if err != nil {
		t.full.Store(errors.Is(err, h2.ErrStreamLimit))
		return err
	}
	r.Attach(t, st)
	t.wantFlush()
	return nil
}

// Drain refuses new streams and closes the trunk when the last relay has
// ended.
func (t *Trunk) Drain() {
	if t.closed || t.draining {
		return
	}
	t.draining = true
	t.s.H2.GoAway(http2.ErrCodeNo, "")
	t.wantFlush()
	t.maybeDrained()
}

// Close ends the trunk and resets its relays.
func (t *Trunk) Close(err error) { t.close(err) }

// Closed reports whether the trunk has ended.
func (t *Trunk) Closed() bool { return t.closed }

// Relays calls f for each relay.
func (t *Trunk) Relays(f func(*Relay)) {
	for r := t.relays; r != nil; {
		next := r.next
		f(r)
		r = next
	}
}

func (t *Trunk) link(r *Relay) {
	r.next = t.relays
	if r.next != nil {
		r.next.prev = r
	}
	t.relays = r
	t.count++
	t.streams.Add(1)
}

func (t *Trunk) unlink(r *Relay) {
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		t.relays = r.next
	}
	if r.next != nil {
		r.next.prev = r.prev
	}
	r.prev, r.next = nil, nil
	t.count--
	t.streams.Add(-1)
	if t.count == 0 {
		t.idleSince = t.w.Loop.Now()
		t.maybeDrained()
	}
}

func (t *Trunk) maybeDrained() {
	if t.draining && t.empty() && !t.closed {
		t.w.Loop.After(0, func() {
			if t.empty() {
				t.close(ErrDrained)
			}
		})
	}
}

// empty reports whether no stream is left, one without a relay included: its
// application is still being reached.
func (t *Trunk) empty() bool { return t.count == 0 && t.s.H2.CountStreams() == 0 }

// fail ends the trunk for an error, telling the peer what it can be told.
func (t *Trunk) fail(err error) {
	var alert *record.LocalAlert
	if errors.As(err, &alert) {
		t.lastWords(alert.Alert)
	}
	if errors.Is(err, io.EOF) && t.count == 0 {
		err = ErrDrained
	}
	t.close(err)
}

func (t *Trunk) close(err error) {
	if t.closed {
		return
	}
	t.closed = true
	t.tick.Stop()
	var broken *h2.ConnError
	if errors.As(err, &broken) || errors.Is(err, ErrIdle) || errors.Is(err, ErrDrained) || errors.Is(err, ErrDead) {
		t.lastWords(record.AlertCloseNotify)
	}
	t.owner.Closed(t, err)
	t.Relays(func(r *Relay) { r.end(EndTrunkLost, http2.ErrCodeNo, err.Error()) })
	t.recycle()
	t.w.Loop.Close(t.fd)
	t.s.H2.Discard()
	delete(t.w.trunks, t)
	t.s.Close()
}
