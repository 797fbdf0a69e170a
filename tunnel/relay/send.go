// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"fmt"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

// What one turn of sending gives a trunk, so that others get theirs.
const (
	bulkShare  = 4 * maxData  // bytes of bulk sealed in a turn beside small frames, 64 KiB
	aloneShare = 16 * maxData // and where there were none lately: fewer turns cost less CPU
	smallShare = 16 * maxData // bytes of small frames sealed in a turn
	pullSlots  = 16           // records filled by one read from an application
)

// smallFor is for how long small frames are reckoned with after the last one.
const smallFor = 100 * time.Millisecond

// notSentLowat bounds the bytes that wait unsent in a trunk's socket, in the
// kernel, where they can no longer be ordered: small frames are to overtake
// bulk. 128 KiB; no cost in bulk throughput was seen.
const notSentLowat = 128 << 10

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
	now := t.w.Loop.Now()
	for n := t.small.len(); n > 0 && share > 0; n-- {
		r := t.small.pop()
		took := t.pull(r, maxData)
		share -= took
		if took > 0 && !r.bulk && !r.flow.elephant(now) {
			t.smallAt = now
		}
	}
	share = bulkShare
	if t.count == 1 || now.Sub(t.smallAt) > smallFor {
		share = aloneShare
	}
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
	moved := false
	for len(t.iov) > 0 {
		n, e := loop.Send(t.fd, t.iov)
		if e == unix.EAGAIN {
			if moved || t.stalled.IsZero() {
				t.stalled = t.w.Loop.Now()
			}
			return false
		}
		moved = true
		if e != 0 {
			t.writeFailed(e)
			return false
		}
		t.iov = loop.Advance(t.iov, n)
	}
	if !t.stalled.IsZero() {
		t.stalled = time.Time{}
	}
	t.recycle()
	return true
}

// writeFailed ends a trunk whose socket takes nothing more. What the peer said
// last may be unread: why it refused us, or which streams it did not process.
func (t *Trunk) writeFailed(e error) {
	t.sockEnded, t.mute = true, true
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
