// SPDX-License-Identifier: Apache-2.0

// Package relay moves bytes between applications' sockets and a tunnel
// connection, on an event loop.
//
// A Worker is what belongs to one loop. A Trunk is a session on its socket; a
// Relay is an application's socket joined to one of the session's streams. All
// of them live on their worker's loop and are to be used on its thread only.
//
// Data is pulled: nothing is read from an application before the session can
// send it, so what waits, waits in the application's own socket. What an
// application does not take is queued on its stream, bounded by the stream's
// window, and the session's reader never stops for it.
//
// A Relay owns its socket and closes it; a Trunk owns its own and ends its
// relays with it. Who asked for them is told once, through Owner and
// TrunkOwner.
package relay

import (
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

// readSlots is the size of a worker's read buffer in full records, 512 KiB and one
// more, so that a partial record in front of them leaves room. It is what a turn
// takes of a session.
const readSlots = 33

// wholeRead is that in bytes.
const wholeRead = readSlots * record.SlotLen

// Worker is what the trunks and relays of one loop share: the read buffer, the
// stock of record slots, and scratch space. An idle connection holds none of
// it.
type Worker struct {
	Loop *loop.Loop

	in      []byte
	stock   batches
	scratch h2.Scratch
	iov     []unix.Iovec
	pieces  [][]unix.Iovec // unused lists of pieces
	touched []*Relay       // relays that have pieces to be delivered

	budget *Budget
	queued int64 // bytes of it that this worker's queues hold
	trunks map[*Trunk]struct{}

	requests requests
}

// NewWorker makes the worker of l. All workers of a node are to be made with the
// same budget before any of them has a trunk; nil: it has one of its own.
func NewWorker(l *loop.Loop, b *Budget) *Worker {
	if b == nil {
		b = NewBudget(0, nil)
	}
	w := &Worker{
		Loop:   l,
		in:     make([]byte, wholeRead),
		iov:    make([]unix.Iovec, 0, readSlots+1),
		budget: b,
		trunks: map[*Trunk]struct{}{},
	}
	w.requests.w = w
	b.join(w)
	return w
}

func (w *Worker) getPieces() []unix.Iovec {
	if n := len(w.pieces); n > 0 {
		p := w.pieces[n-1]
		w.pieces = w.pieces[:n-1]
		return p
	}
	return make([]unix.Iovec, 0, readSlots+1)
}

func (w *Worker) putPieces(p []unix.Iovec) {
	if cap(p) == 0 || len(w.pieces) >= 64 {
		return
	}
	p = p[:cap(p)]
	clear(p)
	w.pieces = append(w.pieces, p[:0])
}

// deliver hands every touched relay its pieces. They alias the read buffer, so
// this comes before the next read.
func (w *Worker) deliver() {
	for i := 0; i < len(w.touched); i++ {
		r := w.touched[i]
		w.touched[i] = nil
		r.deliver()
	}
	w.touched = w.touched[:0]
}
