// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"fmt"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/loop"
)

// End says how a relay ended.
type End uint8

// The ways in which a relay ends.
const (
	EndClean     End = iota // both halves closed, every byte delivered
	EndAppReset             // the application's socket broke
	EndPeerReset            // the peer reset the stream
	EndTrunkLost            // the tunnel connection ended under it
	EndAborted              // by our own side: Abort
	EndHoard                // by us, for what its application did not take
)

// Owner is told of a relay's life. Its methods are called on the loop's
// thread.
type Owner interface {
	// Connected is called once for a relay made by Connecting: err is nil
	// or why the application cannot be reached.
	Connected(r *Relay, err error)
	// Response is called with the fields of the peer's answer, on the side
	// that opened the stream. It calls Open or Abort.
	Response(r *Relay, fields []hpack.HeaderField)
	// Refused is called instead of Closed when the stream was not processed
	// by the peer (GOAWAY, REFUSED_STREAM) and nothing was sent: the relay
	// is detached and may be attached to another trunk.
	Refused(r *Relay)
	// Closed is called once, last. detail says more where there is more.
	Closed(r *Relay, end End, detail string)
}

// discardShare bounds the reads of what nobody wants, 262,624 bytes each.
const discardShare = 32

type phase uint8

const (
	phaseConnecting phase = iota // to the application
	phaseWaiting                 // for a trunk, or for the peer's answer
	phaseOpen
	phaseClosed
)

// Relay is an application's socket and a stream.
type Relay struct {
	w     *Worker
	t     *Trunk // nil until attached
	st    *h2.Stream
	owner Owner
	fd    int

	prev, next *Relay // in the trunk's list

	phase    phase
	readable bool // the socket may hold bytes, or its end
	ended    bool // the socket reported its end, or an urgent byte: read on until nothing is there
	broken   bool // it ended by a reset
	eof      bool // the application's FIN was read and passed on
	fin      bool // the peer's END_STREAM came
	finDone  bool // and was passed on
	queued   bool // in one of the trunk's rings
	stopped  bool // the peer wants no more of it
	bulk     bool // its last read filled a record
	touched  bool

	pieces   []unix.Iovec // of the read buffer, to be delivered in this turn
	sent     uint64       // bytes from the application
	received uint64       // bytes to the application
	flow     flow
	stuck    time.Time // when the application last took something, or there was something to take; while bytes are queued
}

// Waiting makes a relay of an accepted socket, which it owns from then on. It
// waits for Attach.
func (w *Worker) Waiting(fd int, o Owner) (*Relay, error) {
	return w.newRelay(fd, o, phaseWaiting)
}

// Connecting makes a relay of a socket whose connect is under way. It owns the
// socket from then on. Owner.Connected tells how it went.
func (w *Worker) Connecting(fd int, o Owner) (*Relay, error) {
	return w.newRelay(fd, o, phaseConnecting)
}

func (w *Worker) newRelay(fd int, o Owner, p phase) (*Relay, error) {
	r := &Relay{w: w, owner: o, fd: fd, phase: p}
	if err := w.Loop.Register(fd, r); err != nil {
		return nil, err
	}
	return r, nil
}

// Sent is how many bytes have been read from the application, Received how
// many it has been given.
func (r *Relay) Sent() uint64 { return r.sent }

// Received is how many bytes the application has been given.
func (r *Relay) Received() uint64 { return r.received }

// Trunk is the trunk the relay is attached to, or nil.
func (r *Relay) Trunk() *Trunk { return r.t }

// Attach joins the relay to a stream of a trunk of the same worker.
func (r *Relay) Attach(t *Trunk, st *h2.Stream) {
	r.t, r.st = t, st
	_, r.fin = st.User.(ended)
	st.User = r
	if st.QueuedBytes() > 0 { // it came before the answer
		r.stuck = r.w.Loop.Now()
	}
	r.flow.reset(t.window)
	t.link(r)
}

// Established tells a relay made by Connecting that its socket is connected
// already, as it often is on lo.
func (r *Relay) Established() {
	if r.phase != phaseConnecting {
		return
	}
	r.phase = phaseWaiting
	r.owner.Connected(r, nil)
}

// Disconnect closes the socket of a relay made by Connecting, which nobody has
// answered, so that another can be tried: Reconnect or Abort follows. It reports
// false where the answer has come.
func (r *Relay) Disconnect() bool {
	if r.phase != phaseConnecting {
		return false
	}
	if _, err := unix.Getpeername(r.fd); err == nil {
		return false // connected: the loop is about to say so
	}
	r.w.Loop.Close(r.fd)
	r.fd = -1
	return true
}

// Disconnected reports whether the relay has no socket, by Disconnect.
func (r *Relay) Disconnected() bool { return r.phase == phaseConnecting && r.fd < 0 }

// Reconnect gives a relay that is disconnected a socket whose connect is under
// way. On an error the descriptor stays the caller's.
func (r *Relay) Reconnect(fd int) error {
	if err := r.w.Loop.Register(fd, r); err != nil {
		return err
	}
	r.fd = fd
	return nil
}

// ended is a stream's user when its END_STREAM came before there was a relay.
type ended struct{}

// Open lets bytes flow, both ways.
func (r *Relay) Open() {
	if r.phase != phaseWaiting {
		return
	}
	r.phase = phaseOpen
	r.drain()
	r.wantSend()
}

// Detach takes the socket out of a relay that is not attached, so that it can
// go to another loop. Nothing is reported. Of a relay that has ended it returns
// -1: its descriptor is another's by now.
func (r *Relay) Detach() int {
	if r.phase == phaseClosed {
		return -1
	}
	r.phase = phaseClosed
	r.w.Loop.Release(r.fd)
	return r.fd
}

// Abort ends the relay with a reset of the application's socket, and of the
// stream where it is still open.
func (r *Relay) Abort(code http2.ErrCode, detail string) {
	r.end(EndAborted, code, detail)
}

// Ready is the loop's.
func (r *Relay) Ready(ev loop.Events) {
	switch r.phase {
	case phaseConnecting:
		if ev&(loop.Out|loop.Err|loop.Hup) == 0 {
			return
		}
		err := socketError(r.fd)
		r.phase = phaseWaiting
		r.note(ev)
		r.owner.Connected(r, err)
	case phaseWaiting:
		r.note(ev)
		if ev&loop.Err != 0 {
			r.end(EndAppReset, http2.ErrCodeCancel, describe(socketError(r.fd)))
		}
	case phaseOpen:
		if ev&loop.Out != 0 && r.st.QueuedBytes() > 0 {
			r.drain()
			if r.phase != phaseOpen {
				return
			}
		}
		r.note(ev)
		// A reset shows when the socket is read to its end. Where it will
		// not be read, it has to be acted on now.
		if ev&loop.Err != 0 && r.eof {
			r.end(EndAppReset, http2.ErrCodeCancel, describe(socketError(r.fd)))
			return
		}
		r.wantSend()
	}
}

func (r *Relay) note(ev loop.Events) {
	if ev&(loop.In|loop.Ended) != 0 {
		r.readable = true
	}
	if ev&(loop.Ended|loop.Pri) != 0 {
		r.ended = true
	}
	if ev&loop.Err != 0 {
		r.broken = true
	}
}

// wantSend puts the relay where the trunk's next flush finds it. Without a
// window it does nothing: EventWritable comes, unless nobody ever drains the
// other end, so that a reset is not to wait for it.
func (r *Relay) wantSend() {
	if r.phase != phaseOpen || !r.readable || r.eof || r.queued {
		return
	}
	switch {
	case r.st.Sendable() > 0:
		r.t.enqueue(r)
	case r.broken:
		r.end(EndAppReset, http2.ErrCodeCancel, describe(socketError(r.fd)))
	}
}

// add notes a piece of the read buffer for this turn's delivery.
func (r *Relay) add(p []byte) {
	if len(p) == 0 {
		return
	}
	if r.pieces == nil {
		r.pieces = r.w.getPieces()
	}
	r.pieces = append(r.pieces, unix.Iovec{Base: &p[0], Len: uint64(len(p))})
	r.touch()
}

func (r *Relay) touch() {
	if !r.touched {
		r.touched = true
		r.w.touched = append(r.w.touched, r)
	}
}

// deliver hands the application its pieces in one call; what it does not take
// is queued.
func (r *Relay) deliver() {
	r.touched = false
	if r.phase == phaseClosed {
		return
	}
	all := r.pieces
	r.pieces = nil
	iov := all
	if r.phase == phaseOpen && r.st.QueuedBytes() == 0 {
		for len(iov) > 0 {
			n, e := loop.Send(r.fd, iov)
			if e == unix.EAGAIN {
				break
			}
			if e != 0 {
				r.w.putPieces(all)
				r.end(EndAppReset, http2.ErrCodeCancel, describe(e))
				return
			}
			iov = loop.Advance(iov, n)
			r.took(n)
		}
	}
	if len(iov) > 0 && r.st.QueuedBytes() == 0 {
		r.stuck = r.w.Loop.Now()
	}
	for i := range iov {
		r.st.Enqueue(unsafe.Slice(iov[i].Base, iov[i].Len))
	}
	r.w.putPieces(all)
	r.passEnd()
}

// drain gives the application what was queued for it.
func (r *Relay) drain() {
	for r.st.QueuedBytes() > 0 {
		q := r.st.Queued()
		iov := r.w.iov[:0]
		for _, p := range q[:min(len(q), readSlots)] {
			iov = append(iov, unix.Iovec{Base: &p[0], Len: uint64(len(p))})
		}
		n, e := loop.Send(r.fd, iov)
		clear(iov)
		if e == unix.EAGAIN {
			return
		}
		if e != 0 {
			r.end(EndAppReset, http2.ErrCodeCancel, describe(e))
			return
		}
		r.stuck = r.w.Loop.Now()
		r.st.Dequeue(n)
		r.took(n)
	}
	r.passEnd()
}

func (r *Relay) took(n int) {
	r.received += uint64(n)
	if target := r.flow.took(r.t, n); target != 0 {
		r.t.s.H2.SetWindow(r.st, target)
	}
	r.t.s.H2.Taken(r.st, n)
	r.t.wantFlush()
}

// passEnd passes the peer's END_STREAM on once every byte has been.
func (r *Relay) passEnd() {
	if r.phase != phaseOpen || !r.fin || r.finDone || r.st.QueuedBytes() > 0 {
		return
	}
	r.finDone = true
	if err := unix.Shutdown(r.fd, unix.SHUT_WR); err != nil {
		r.end(EndAppReset, http2.ErrCodeCancel, describe(err))
		return
	}
	r.maybeClean()
}

// appEOF passes the application's FIN on.
func (r *Relay) appEOF() {
	r.eof = true
	r.readable = false
	r.t.s.H2.End(r.st)
	r.maybeClean()
}

// stop takes no more of the application: the peer, which has ended its half,
// wants nothing of the other. What it sent is delivered whole (RFC 9113,
// section 8.1).
func (r *Relay) stop() {
	r.stopped, r.eof = true, true
	r.maybeClean()
}

func (r *Relay) maybeClean() {
	if r.eof && r.finDone {
		r.end(EndClean, http2.ErrCodeNo, "")
	}
}

// end closes the socket, the stream where it is still open, and reports.
func (r *Relay) end(how End, code http2.ErrCode, detail string) {
	if r.phase == phaseClosed {
		return
	}
	r.phase = phaseClosed
	if how == EndClean {
		if r.stopped {
			r.discard()
		}
		_ = unix.SetsockoptLinger(r.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
	} else {
		// A reset for the application: it must not take what it has for
		// the whole. Listeners and the stock set this too, for the case
		// that we are killed.
		_ = unix.SetsockoptLinger(r.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	r.w.Loop.Close(r.fd)
	if t := r.t; t != nil {
		if how == EndAppReset || how == EndAborted || how == EndHoard {
			t.s.H2.Reset(r.st, code)
			t.wantFlush()
		}
		r.st.Discard()
		r.st.User = nil
		t.unlink(r)
	}
	if r.pieces != nil {
		r.w.putPieces(r.pieces)
		r.pieces = nil
	}
	r.owner.Closed(r, how, detail)
}

// discard reads what the application sent and nobody wants. Closing over unread
// bytes would reset it, with what is on its way to it.
func (r *Relay) discard() {
	b := r.w.stock.get(pullSlots) // the read buffer may be in use
	defer r.w.stock.put(b)
	for range discardShare {
		iov := [1]unix.Iovec{{Base: &b.mem[0], Len: uint64(len(b.mem))}}
		if n, e := loop.Recv(r.fd, iov[:]); n <= 0 || e != 0 {
			return
		}
	}
}

// refused gives an unprocessed stream's relay back to its owner.
func (r *Relay) refused() {
	r.st.User = nil
	r.t.unlink(r)
	r.t, r.st = nil, nil
	r.owner.Refused(r)
}

func socketError(fd int) error {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return err
	}
	if n != 0 {
		return syscall.Errno(n)
	}
	return nil
}

func describe(err error) string {
	if err == nil {
		return "socket error"
	}
	return fmt.Sprint(err)
}
