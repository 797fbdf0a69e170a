// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"fmt"
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

// What one turn gives a trunk, so that others get theirs.
const (
	bulkShare  = 8 * maxData  // bytes of bulk sealed in a turn, 128 KiB
	smallShare = 16 * maxData // bytes of small frames sealed in a turn
	readShare  = 2            // read buffers' worth of ciphertext in a turn
	pullSlots  = 16           // records filled by one read from an application
)

// refillEvery is how often a peer gets its budget for frames of no use back.
const refillEvery = time.Second

// notSentLowat bounds the bytes that wait unsent in a trunk's socket, in the
// kernel, where they can no longer be ordered: small frames are to overtake
// bulk. 128 KiB; no cost in bulk throughput was seen.
const notSentLowat = 128 << 10

// Errors with which a trunk ends, besides those of tunnel/session and of its
// socket.
var (
	ErrTruncated = errors.New("tunnel connection closed without close_notify")
	ErrDead      = errors.New("peer does not answer")
	ErrIdle      = errors.New("idle")
	ErrDrained   = errors.New("drained")
	ErrUnsealed  = errors.New("the record layer seals nothing any more")
)

// TrunkOwner is told of a trunk's life, on the loop's thread.
type TrunkOwner interface {
	// Established is called at the peer's first record: only then is it
	// known that it accepted our certificate.
	Established(t *Trunk)
	// Request is called for a stream that the peer opened.
	Request(t *Trunk, st *h2.Stream, fields []hpack.HeaderField)
	// Closed is called once, before the relays are ended.
	Closed(t *Trunk, err error)
}

// TrunkConfig has a trunk's time limits. Zero means never.
type TrunkConfig struct {
	// Until is when the peer's certificate ends, by the wall clock: from then on
	// the trunk drains.
	Until time.Time

	PingAfter time.Duration // silence after which the peer is asked
	DeadAfter time.Duration // silence after which it is given up; longer than PingAfter
	IdleAfter time.Duration // time without streams after which it is closed
}

// Trunk is a session on its socket.
type Trunk struct {
	w     *Worker
	s     *session.Session
	owner TrunkOwner
	cfg   TrunkConfig
	fd    int

	out   writer
	sent  []*batch     // sealed, being written
	iov   []unix.Iovec // what of them is still to be written
	iovs  []unix.Iovec // its memory
	ctl   []byte       // sealed control records in front of them
	small ring
	bulk  ring

	relays *Relay // list
	count  int    // of relays
	window int    // a new stream's receive window

	dirty     bool // in the loop's list of flushes
	unread    bool // the socket may hold more
	sockEnded bool // and reported its end
	alive     bool // the first record came
	closed    bool
	draining  bool // no new streams; closes with the last relay

	lastRead  time.Time
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
	t := &Trunk{w: w, s: s, owner: o, cfg: cfg, fd: fd, window: startWindow, lastRead: now, idleSince: now}
	t.out.stock = &w.stock
	s.H2.Share(&w.scratch)
	if err := w.Loop.Register(fd, t); err != nil {
		return nil, err
	}
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

// Worker is the trunk's worker.
func (t *Trunk) Worker() *Worker { return t.w }

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

func (t *Trunk) wantFlush() {
	if !t.dirty && !t.closed {
		t.dirty = true
		t.w.Loop.AtFlush(t)
	}
}

func (t *Trunk) enqueue(r *Relay) {
	r.queued = true
	if r.bulk {
		t.bulk.push(r)
	} else {
		t.small.push(r)
	}
	t.wantFlush()
}

// Ready is the loop's.
func (t *Trunk) Ready(ev loop.Events) {
	if t.closed {
		return
	}
	if ev&loop.Out != 0 && len(t.iov) > 0 {
		t.wantFlush()
	}
	if ev&loop.Ended != 0 {
		t.sockEnded = true
	}
	if ev&(loop.In|loop.Ended) != 0 || t.unread {
		t.read()
	}
}

// read takes a bounded share of the socket, opens its records in place and
// hands the applications their pieces.
func (t *Trunk) read() {
	t.unread = false
	mem := t.w.in
	for range readShare {
		kept := t.s.Restore(mem)
		iov := [1]unix.Iovec{{Base: &mem[kept], Len: uint64(len(mem) - kept)}}
		n, e := loop.Recv(t.fd, iov[:])
		var failed error
		switch {
		case e == unix.EAGAIN:
		case e != 0:
			failed = fmt.Errorf("read tunnel connection: %w", e)
		case n == 0:
			failed = ErrTruncated
		default:
			t.lastRead = t.w.Loop.Now()
			if t.lastRead.Sub(t.refilled) >= refillEvery {
				t.refilled = t.lastRead
				t.s.H2.Refill()
			}
		}
		if n > 0 || kept > 0 {
			rest, err := t.records(mem[:kept+n])
			t.w.deliver()
			if t.closed {
				return
			}
			if err != nil {
				t.fail(err)
				return
			}
			t.s.Keep(rest)
		}
		if failed != nil {
			t.fail(failed)
			return
		}
		if e == unix.EAGAIN || (kept+n < len(mem) && !t.sockEnded) {
			return
		}
	}
	t.unread = true
	t.w.Loop.Again(t)
}

func (t *Trunk) records(buf []byte) (rest []byte, err error) {
	for !t.closed {
		n, events, err := t.s.Next(buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		if !t.alive {
			t.alive = true
			t.owner.Established(t)
		}
		buf = buf[n:]
		for i := range events {
			t.event(&events[i])
		}
	}
	if t.s.Records.NeedsControl() || len(t.s.H2.Control()) > 0 {
		t.wantFlush()
	}
	t.maybeDrained()
	return buf, nil
}

func (t *Trunk) event(ev *h2.Event) {
	var r *Relay
	if ev.Stream != nil {
		r, _ = ev.Stream.User.(*Relay)
	}
	switch ev.Kind {
	case h2.EventData:
		if r != nil {
			r.add(ev.Data)
		} else {
			// Data before the application was reached: the owner has not
			// made a relay yet. It is bounded by the window.
			ev.Stream.Enqueue(ev.Data)
		}
	case h2.EventEnd:
		if r != nil {
			r.fin = true
			r.touch()
		} else {
			ev.Stream.User = ended{}
		}
	case h2.EventHeaders:
		switch {
		case r == nil:
			t.owner.Request(t, ev.Stream, ev.Headers)
		case r.phase == phaseWaiting:
			r.owner.Response(r, ev.Headers)
		}
	case h2.EventReset:
		if r == nil {
			t.s.H2.Reset(ev.Stream, ev.Code) // forgets what nobody will read
			return
		}
		if r.phase == phaseWaiting && r.sent == 0 && ev.Code == http2.ErrCodeRefusedStream {
			r.refused()
			return
		}
		if r.fin && !ev.Local && ev.Code == http2.ErrCodeNo {
			r.stop()
			return
		}
		// What came before the reset was sent before it.
		r.deliver()
		if ev.Local {
			r.end(EndTrunkLost, ev.Code, "the peer broke the stream's rules: "+ev.Code.String())
		} else {
			r.end(EndPeerReset, ev.Code, "stream reset by peer: "+ev.Code.String())
		}
	case h2.EventWritable:
		if r != nil {
			r.wantSend()
		}
	case h2.EventGoAway:
		t.draining = true
		t.maybeDrained()
	case h2.EventStreamsAvailable:
		t.full.Store(false)
	case h2.EventPong:
		t.pong()
	}
}

// Flush is the loop's, at the end of a turn: it writes what is sealed, then
// fills, seals and writes once more.
func (t *Trunk) Flush() {
	t.dirty = false
	if t.closed || !t.write() {
		return
	}
	if !t.fill() || !t.write() {
		return
	}
	t.maybeDrained()
	if !t.closed && (t.small.len() > 0 || t.bulk.len() > 0 || len(t.s.H2.Control()) > 0) {
		t.wantFlush()
	}
}

// fill seals control frames, then small frames, then a share of bulk. It
// reports false when the trunk has ended by it.
func (t *Trunk) fill() bool {
	t.iov = t.iovs[:0]
	if t.s.Records.NeedsControl() {
		t.ctl = t.s.Records.Due(t.ctl[:0])
		t.iov = append(t.iov, unix.Iovec{Base: &t.ctl[0], Len: uint64(len(t.ctl))})
	}
	t.fillControl()
	share := smallShare
	for n := t.small.len(); n > 0 && share > 0; n-- {
		share -= t.pull(t.small.pop(), maxData)
	}
	share = bulkShare
	for share > 0 && t.bulk.len() > 0 {
		share -= max(1, t.pull(t.bulk.pop(), min(share, pullSlots*maxData)))
	}
	t.fillControl()
	var ok bool
	t.iov, t.sent, ok = t.out.seal(t.s.Records, t.iov, t.sent)
	t.iovs = t.iov
	if !ok { // or an owner has closed the trunk when it was told of a relay's end
		t.fail(ErrUnsealed)
	}
	return ok
}

func (t *Trunk) fillControl() {
	for len(t.s.H2.Control()) > 0 {
		slot, used := t.out.room(1)
		t.out.grow(t.s.FillControl(slot, used))
	}
}

// pull reads up to limit bytes of an application into record slots.
func (t *Trunk) pull(r *Relay, limit int) int {
	r.queued = false
	if r.phase != phaseOpen || r.eof {
		return 0
	}
	if limit = min(limit, r.st.Sendable()); limit <= 0 {
		r.wantSend()
		return 0
	}
	iov := t.out.scatter(t.w.iov[:0], limit)
	n, e := loop.Recv(r.fd, iov)
	clear(iov)
	switch {
	case e == unix.EAGAIN:
		r.readable = false
		return 0
	case e != 0:
		r.end(EndAppReset, http2.ErrCodeCancel, describe(e))
		return 0
	case n == 0:
		r.appEOF()
		return 0
	}
	r.sent += uint64(n)
	r.flow.count(t, n)
	for left := n; left > 0; {
		slot, used := t.out.room(frameHeader + 1)
		k := min(left, record.MaxPlaintext-used-frameHeader)
		t.s.H2.PutData(slot[record.HeaderLen+used:], r.st, k, false)
		t.out.grow(frameHeader + k)
		left -= k
	}
	r.bulk = n >= maxData
	if n < limit && !r.ended {
		r.readable = false // drained: the next byte raises an edge
	}
	r.wantSend()
	return n
}

// write writes what is sealed, and reports whether all of it went.
func (t *Trunk) write() bool {
	for len(t.iov) > 0 {
		n, e := loop.Send(t.fd, t.iov)
		if e == unix.EAGAIN {
			return false
		}
		if e != 0 {
			t.writeFailed(e)
			return false
		}
		t.iov = loop.Advance(t.iov, n)
	}
	t.recycle()
	return true
}

// writeFailed ends a trunk whose socket takes nothing more. What the peer said
// last may be unread: why it refused us, or which streams it did not process.
func (t *Trunk) writeFailed(e error) {
	t.sockEnded = true
	for t.unread = true; t.unread && !t.closed; {
		t.read()
	}
	t.fail(fmt.Errorf("write tunnel connection: %w", e))
}

func (t *Trunk) recycle() {
	t.iov = nil
	for i, b := range t.sent {
		t.w.stock.put(b)
		t.sent[i] = nil
	}
	t.sent = t.sent[:0]
}

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

// lastWords seals what is pending and an alert, and tries to send them once.
func (t *Trunk) lastWords(alert uint8) {
	t.fillControl()
	t.iov, t.sent, _ = t.out.seal(t.s.Records, t.iov, t.sent)
	b := t.s.Records.AppendAlert(nil, alert)
	if len(b) > 0 {
		t.iov = append(t.iov, unix.Iovec{Base: &b[0], Len: uint64(len(b))})
	}
	for len(t.iov) > 0 {
		n, e := loop.Send(t.fd, t.iov)
		if e != 0 {
			break
		}
		t.iov = loop.Advance(t.iov, n)
	}
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
	t.s.Close()
}

// schedule looks at the time limits now and then.
func (t *Trunk) schedule() {
	var d time.Duration
	for _, limit := range [...]time.Duration{t.cfg.PingAfter, t.cfg.DeadAfter, t.cfg.IdleAfter} {
		if limit > 0 && (d == 0 || limit < d) {
			d = limit
		}
	}
	d /= 2
	if !t.cfg.Until.IsZero() && !t.draining {
		if left := time.Until(t.cfg.Until); d == 0 || left < d {
			d = max(left, time.Millisecond)
		}
	}
	if d == 0 {
		return
	}
	t.tick = t.w.Loop.After(max(d, time.Millisecond), func() {
		t.check(t.w.Loop.Now())
		if !t.closed {
			t.schedule()
		}
	})
}

func (t *Trunk) check(now time.Time) {
	if !t.cfg.Until.IsZero() && now.After(t.cfg.Until) {
		t.Drain()
	}
	silent := now.Sub(t.lastRead)
	switch {
	case t.cfg.DeadAfter > 0 && silent >= t.cfg.DeadAfter && t.asked(now):
		t.close(ErrDead)
	case t.cfg.IdleAfter > 0 && t.empty() && now.Sub(t.idleSince) >= t.cfg.IdleAfter:
		t.s.H2.GoAway(http2.ErrCodeNo, "idle")
		t.close(ErrIdle)
	case t.cfg.PingAfter > 0 && silent >= t.cfg.PingAfter:
		t.ping(now)
	}
}

// asked reports whether the peer has had its time to answer. It has not when we
// were the ones that stood still: a suspended machine, a stopped process.
func (t *Trunk) asked(now time.Time) bool {
	return t.cfg.PingAfter == 0 || !t.pingAt.IsZero() && now.Sub(t.pingAt) >= t.cfg.DeadAfter-t.cfg.PingAfter
}

func (t *Trunk) ping(now time.Time) {
	if t.pingAt.IsZero() {
		t.pingAt = now
	}
	t.s.H2.Ping([8]byte{'c', 'u', 'l', 'v', 'e', 'r', 't'})
	t.wantFlush()
}

// measure pings for the round trip, once at a time.
func (t *Trunk) measure(now time.Time) {
	if t.pingAt.IsZero() && t.rtt == 0 {
		t.ping(now)
	}
}

func (t *Trunk) pong() {
	if !t.pingAt.IsZero() {
		d := time.Since(t.pingAt)
		if t.rtt == 0 || d < t.rtt {
			t.rtt = d
		}
		t.pingAt = time.Time{}
	}
}
