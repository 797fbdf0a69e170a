// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/loop"
)

// acceptShare is how many connections a listener's turn takes: an eighth of a
// millisecond of work where they are refused. With 16 a flood of them costs others a
// third more at the p99, with no gain for anybody.
const acceptShare = 4

// acceptPause is how long a listener rests when it can neither take connections
// nor refuse them.
const acceptPause = 100 * time.Millisecond

// shortSaid is how often the log says that descriptors have run out.
const shortSaid = 10 * time.Second

// errNoDescriptors is why a connection is refused that has none.
var errNoDescriptors = errors.New("the daemon has no descriptors left (RLIMIT_NOFILE)")

// keptDescriptors is how many descriptors are no connection's: with them files are
// read, and metrics and the admin socket answer, when the others have run out. Of
// a low limit it is an eighth.
const keptDescriptors = 64

// descriptors is how many descriptors the process may have.
func descriptors() (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read the limit of open files: %w", err)
	}
	return int(min(limit.Cur, math.MaxInt32)), nil
}

// scarce reports whether a connection is not to have this descriptor.
func (t *Tunnel) scarce(fd int) bool { return fd >= t.top }

// acceptor is a listener on a loop.
type acceptor struct {
	w        *worker
	fd       int
	accepted func(fd int)
	full     func(fd int) // ends one that there is no descriptor for
	resting  bool         // until a pause is over
	closed   bool
}

// close closes the listener. What a pause has put off is not done any more: the
// number may be another's by then.
func (a *acceptor) close() {
	a.closed = true
	a.w.Loop.Close(a.fd)
}

// Ready is the loop's.
func (a *acceptor) Ready(loop.Events) {
	if a.closed || a.resting {
		return
	}
	for range acceptShare {
		fd, e := loop.Accept(a.fd)
		if e == unix.EMFILE || e == unix.ENFILE {
			// Not all are the tunnel's. What waits has connected already, and
			// would wait for as long as it takes: refuse it now, by the one
			// that is kept for that. Who is faster may take it, too.
			a.w.spare.release()
			if fd, e = loop.Accept(a.fd); e == 0 {
				a.refuse(fd)
			}
			a.w.spare.hold()
		} else if e == 0 {
			if a.w.t.scarce(fd) {
				a.refuse(fd)
			} else {
				a.accepted(fd)
			}
		}
		switch e {
		case 0:
		case unix.EAGAIN, unix.EBADF, unix.EINVAL:
			return
		default:
			// What waits is in the queue, and no edge will tell of it again. One
			// pause at a time: each of them ends in another while it lasts.
			a.resting = true
			a.w.Loop.After(acceptPause, func() { a.resting = false; a.Ready(0) })
			return
		}
	}
	a.w.Loop.Again(a)
}

// refuse ends a connection that is to have no descriptor.
func (a *acceptor) refuse(fd int) {
	t, w := a.w.t, a.w
	if now := w.Loop.Now(); now.Sub(w.shortSaid) >= shortSaid {
		w.shortSaid = now
		t.cfg.Logger.Error("out of descriptors: new connections are refused until there are some", "limit", t.top, "hint", "raise the limit of open files (RLIMIT_NOFILE, LimitNOFILE)")
	}
	t.limits.descriptors.Add(1)
	a.full(fd)
}

// spare is a descriptor that a loop keeps for when there are no others.
type spare struct {
	fd   int
	held bool
}

// hold takes one, if it can and has none.
func (s *spare) hold() {
	if s.held {
		return
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err == nil {
		s.fd, s.held = fd, true
	}
}

func (s *spare) release() {
	if s.held {
		unix.Close(s.fd)
		s.held = false
	}
}

// addr converts a socket address, v4-mapped ones to IPv4.
func addr(sa unix.Sockaddr) (netip.AddrPort, bool) {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)), true
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port)), true
	}
	return netip.AddrPort{}, false
}

// ends returns a connected socket's own and its peer's address.
func ends(fd int) (local, remote netip.AddrPort, ok bool) {
	l, err := unix.Getsockname(fd)
	if err != nil {
		return local, remote, false
	}
	r, err := unix.Getpeername(fd)
	if err != nil {
		return local, remote, false
	}
	local, ok = addr(l)
	if !ok {
		return local, remote, false
	}
	remote, ok = addr(r)
	return local, remote, ok
}

// refuse resets a connection.
func refuse(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
}
