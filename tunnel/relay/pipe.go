// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/loop"
)

// What one turn gives each direction of a pipe, so that others get theirs.
const (
	pipeChunk = 64 << 10 // bytes moved by one call
	pipeShare = 2        // calls at a time; a turn has at most three: two events, and Again
)

// PipeOwner is told of a pipe's life. Its methods are called on the loop's thread.
type PipeOwner interface {
	// PipeConnected is called once: err is nil or why the application cannot be
	// reached. It calls Open or Abort.
	PipeConnected(p *Pipe, err error)
	// PipeClosed is called once, last. EndAppReset is the application's doing,
	// EndPeerReset the client's.
	PipeClosed(p *Pipe, end End, detail string)
}

// Pipe joins two sockets of applications, a client's and that of the application
// it called. It holds no byte itself: what one end has sent is looked at in its
// socket, given to the other end's, and taken out only as far as that took it. So
// a stuck reader costs nothing here, and its sender is slowed down by the kernel.
type Pipe struct {
	w           *Worker
	owner       PipeOwner
	client, app pipeEnd
	phase       phase
}

// pipeEnd is one of a pipe's sockets, as the source of a direction.
type pipeEnd struct {
	p    *Pipe
	to   *pipeEnd
	fd   int    // -1: none
	sent uint64 // bytes given to the other end

	readable bool // the socket may hold bytes, or its end
	ended    bool // the socket reported its end, or an urgent byte: read on until nothing is there
	broken   bool // it ended by a reset
	full     bool // it takes no bytes at present
	eof      bool // its FIN was read and passed on
	again    bool // it asked for another turn
}

// Piping makes a pipe of a client's connection, and owns that from then on. The
// application is to be connected: Connect.
func (w *Worker) Piping(client int, o PipeOwner) (*Pipe, error) {
	p := &Pipe{w: w, owner: o, phase: phaseConnecting}
	p.client = pipeEnd{p: p, to: &p.app, fd: client}
	p.app = pipeEnd{p: p, to: &p.client, fd: -1}
	if err := w.Loop.Register(client, &p.client); err != nil {
		return nil, err
	}
	return p, nil
}

// Connect gives the pipe a socket to the application, whose connect is under way,
// and which it owns from then on. On an error the descriptor stays the caller's.
func (p *Pipe) Connect(fd int) error {
	if err := p.w.Loop.Register(fd, &p.app); err != nil {
		return err
	}
	p.app.fd = fd
	return nil
}

// Disconnect closes the socket to the application, which has not answered, so
// that another can be tried: Connect or Abort follows. It reports false where the
// answer has come.
func (p *Pipe) Disconnect() bool {
	if p.phase != phaseConnecting {
		return false
	}
	if _, err := unix.Getpeername(p.app.fd); err == nil {
		return false // connected: the loop is about to say so
	}
	p.w.Loop.Close(p.app.fd)
	p.app = pipeEnd{p: p, to: &p.client, fd: -1}
	return true
}

// Disconnected reports whether the pipe has no socket to the application.
func (p *Pipe) Disconnected() bool { return p.phase == phaseConnecting && p.app.fd < 0 }

// Established tells the pipe that the socket to the application is connected
// already, as it often is on lo.
func (p *Pipe) Established() {
	if p.phase != phaseConnecting {
		return
	}
	p.phase = phaseWaiting
	p.owner.PipeConnected(p, nil)
}

// Open lets bytes flow, both ways.
func (p *Pipe) Open() {
	if p.phase != phaseWaiting {
		return
	}
	p.phase = phaseOpen
	p.client.askAgain()
	p.app.askAgain()
}

// FromClient is how many bytes the application has been given, ToClient how many
// the client has.
func (p *Pipe) FromClient() uint64 { return p.client.sent }

// ToClient is how many bytes the client has been given.
func (p *Pipe) ToClient() uint64 { return p.app.sent }

// Abort ends the pipe with a reset of both sockets.
func (p *Pipe) Abort(detail string) { p.end(EndAborted, detail) }

// Ready is the loop's.
func (e *pipeEnd) Ready(ev loop.Events) {
	p := e.p
	if p.phase == phaseClosed {
		return
	}
	if p.phase == phaseConnecting && e == &p.app {
		if ev&(loop.Out|loop.Err|loop.Hup) == 0 {
			return
		}
		e.note(ev)
		err := socketError(e.fd)
		p.phase = phaseWaiting
		p.owner.PipeConnected(p, err)
		return
	}
	e.note(ev)
	if p.phase != phaseOpen {
		if e.broken { // nobody reads it yet
			e.reset(socketError(e.fd))
		}
		return
	}
	if ev == 0 {
		e.again = false
	}
	if ev&loop.Out != 0 && e.full {
		e.full = false
		if e.to.move(); p.phase == phaseClosed {
			return
		}
	}
	e.move()
}

func (e *pipeEnd) note(ev loop.Events) {
	if ev&(loop.In|loop.Ended) != 0 {
		e.readable = true
	}
	if ev&(loop.Ended|loop.Pri) != 0 {
		e.ended = true
	}
	if ev&loop.Err != 0 {
		e.broken = true
	}
}

// move gives the other end a bounded share of what this one has sent.
func (e *pipeEnd) move() {
	for range pipeShare {
		switch {
		case e.broken && (e.eof || e.to.full):
			// A reset shows when the socket is read to its end. Where it will
			// not be read, it has to be acted on now: nobody may ever drain
			// the other end.
			e.reset(socketError(e.fd))
			return
		case !e.readable || e.eof || e.to.full:
			return
		}
		if !e.step() {
			return
		}
	}
	e.askAgain()
}

func (e *pipeEnd) askAgain() {
	if !e.again {
		e.again = true
		e.p.w.Loop.Again(e)
	}
}

// step moves one chunk, and reports whether there may be more to do.
func (e *pipeEnd) step() bool {
	mem := e.p.w.in[:pipeChunk]
	iov := [1]unix.Iovec{{Base: &mem[0], Len: pipeChunk}}
	n, errno := loop.Peek(e.fd, iov[:])
	switch {
	case errno == unix.EAGAIN:
		e.readable = false
		return false
	case errno != 0:
		e.reset(errno)
		return false
	case n == 0:
		e.finish()
		return false
	}
	iov[0].Len = uint64(n)
	k, errno := loop.Send(e.to.fd, iov[:])
	switch {
	case errno == unix.EAGAIN:
		e.to.full = true
		return true // unless it is broken
	case errno != 0:
		e.to.reset(errno)
		return false
	}
	e.sent += uint64(k)
	e.to.full = k < n
	iov[0] = unix.Iovec{Base: &mem[0], Len: uint64(k)}
	if got, errno := loop.Discard(e.fd, iov[:]); errno != 0 || got != k {
		// Else the same bytes would be sent twice. A reset since the look has
		// emptied the socket.
		if errno == 0 {
			e.reset(fmt.Errorf("%d bytes of %d were gone", k-got, k))
			return false
		}
		e.reset(errno)
		return false
	}
	if n < pipeChunk && k == n && !e.ended {
		e.readable = false // drained: the next byte raises an edge
	}
	return true
}

// finish passes the end's FIN on.
func (e *pipeEnd) finish() {
	e.eof, e.readable = true, false
	if err := unix.Shutdown(e.to.fd, unix.SHUT_WR); err != nil {
		e.to.reset(err)
		return
	}
	if e.to.eof {
		e.p.end(EndClean, "")
	}
}

// reset ends the pipe: this end's socket broke.
func (e *pipeEnd) reset(err error) {
	how := EndAppReset
	if e == &e.p.client {
		how = EndPeerReset
	}
	e.p.end(how, describe(err))
}

// end closes both sockets and reports.
func (p *Pipe) end(how End, detail string) {
	if p.phase == phaseClosed {
		return
	}
	p.phase = phaseClosed
	// Unless both halves came to their ends, each is to see a reset: it must not
	// take what it has for the whole.
	linger := unix.Linger{Onoff: 1}
	if how == EndClean {
		linger = unix.Linger{}
	}
	for _, e := range [...]*pipeEnd{&p.client, &p.app} {
		if e.fd < 0 {
			continue
		}
		_ = unix.SetsockoptLinger(e.fd, unix.SOL_SOCKET, unix.SO_LINGER, &linger)
		p.w.Loop.Close(e.fd)
	}
	p.owner.PipeClosed(p, how, detail)
}
