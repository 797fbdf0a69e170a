// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"fmt"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

// A read may bring thousands of the smallest frames, and costs by their number. So
// a session is read by one record at first, by twice as much each time that it
// fills that, up to the whole buffer, and by one record again when it has brought
// more frames than its share.
const (
	leastRead  = record.SlotLen // bytes
	frameShare = 256            // frames
)

// refillEvery is how often a peer gets its budget for frames of no use back.
const refillEvery = time.Second

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

// read takes a turn's share of the socket, opens its records in place and hands
// the applications their pieces.
func (t *Trunk) read() {
	t.unread = false
	if len(t.requests) > 0 && !t.mute {
		// Its share of the turns is used up: the rest waits in the socket.
		t.unread = true
		return
	}
	mem := t.w.in
	kept := t.s.Restore(mem)
	room := min(t.room, len(mem)-kept)
	iov := [1]unix.Iovec{{Base: &mem[kept], Len: uint64(room)}}
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
		frames := t.s.H2.Frames()
		rest, err := t.records(mem[:kept+n])
		t.room = nextRead(room, n, t.s.H2.Frames()-frames)
		t.w.deliver()
		if t.closed {
			return
		}
		if err != nil {
			t.fail(err)
			return
		}
		t.s.Keep(rest)
		if t.peer.over() || t.w.budget.over() {
			t.w.relieve(t.peer)
			if t.closed {
				return
			}
		}
	}
	if failed != nil {
		t.fail(failed)
		return
	}
	if e == unix.EAGAIN || (n < room && !t.sockEnded) {
		return
	}
	t.unread = true
	t.w.Loop.Again(t)
}

// nextRead is what a read may take after one of n bytes and so many frames that
// might have taken room.
func nextRead(room, n int, frames uint64) int {
	switch {
	case frames > frameShare:
		return leastRead
	case n == room:
		return min(2*room, wholeRead)
	}
	return room
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
	t.w.requests.serve()
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
			t.ask(ev.Stream, ev.Headers)
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
