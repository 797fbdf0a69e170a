// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/loop"
)

// acceptShare is how many connections a listener's turn takes.
const acceptShare = 64

// acceptPause is how long a listener rests when descriptors have run out.
const acceptPause = 100 * time.Millisecond

// acceptor is a listener on a loop.
type acceptor struct {
	w        *worker
	fd       int
	accepted func(fd int)
	log      *slog.Logger
}

// Ready is the loop's.
func (a *acceptor) Ready(loop.Events) {
	for range acceptShare {
		fd, e := loop.Accept(a.fd)
		switch e {
		case 0:
			a.accepted(fd)
		case unix.EAGAIN, unix.EBADF, unix.EINVAL:
			return
		default:
			// Out of descriptors or memory: what waits is in the queue,
			// and no edge will tell of it again.
			a.log.Error("accept connection", "err", e, "hint", "raise the limit of open files (LimitNOFILE)")
			a.w.Loop.After(acceptPause, func() { a.Ready(0) })
			return
		}
	}
	a.w.Loop.Again(a)
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
