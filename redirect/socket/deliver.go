// SPDX-License-Identifier: Apache-2.0

package socket

import (
	"fmt"
	"math/rand/v2"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Our own ports lie outside the applications' ephemeral range (32768-60999 by
// default), so that a delivery never has the four-tuple of a connection that an
// application opened: it would go unanswered. The kernel's own choice may.
const (
	firstPort = 10240
	lastPort  = 32767
	// portTries is how many ports are tried before EADDRINUSE is reported.
	portTries = 64
)

// eachPort calls f with ports of the range, from a random one on, until one is
// not in use.
func eachPort(f func(port uint16) error) error {
	const n = lastPort - firstPort + 1
	at := rand.IntN(n)
	step := 1 + 2*rand.IntN(n/2) // odd, and n is no multiple of most: spreads
	var err error
	for range portTries {
		err = f(uint16(firstPort + at))
		if err != unix.EADDRINUSE && err != unix.EADDRNOTAVAIL {
			return err
		}
		at = (at + step) % n
	}
	return fmt.Errorf("no port of %d-%d is free, %d were tried: %w", firstPort, lastPort, portTries, err)
}

// Deliver connects a delivery socket to the application at dst, from the
// client's address and a port of our range. unix.EINPROGRESS means that it is
// under way. On lo it is often over when connect returns.
func Deliver(fd int, client netip.Addr, dst netip.AddrPort) error {
	to := sockaddr(dst)
	bound := false
	return eachPort(func(port uint16) error {
		if bound {
			return unix.EADDRINUSE // a bound socket keeps its port
		}
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(client, port))); err != nil {
			return err
		}
		bound = true
		return unix.Connect(fd, to)
	})
}

// delivery makes a delivery socket in the calling thread's namespace.
func (m *Maker) delivery(v6 bool) (int, error) {
	fd, err := m.socket(v6)
	if err != nil {
		return -1, err
	}
	o := options{fd: fd}
	o.set("SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	o.set("TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1)
	o.set("SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, carriedMark)
	o.transparent(v6)
	if o.err == nil {
		// Else the local table answers with eth0 as incoming interface, and
		// the delivery is steered back into the tunnel.
		if err := unix.BindToDevice(fd, "lo"); err != nil {
			o.err = fmt.Errorf("bind to lo: %w", err)
		}
	}
	o.resetOnExit()
	if o.err != nil {
		unix.Close(fd)
		return -1, o.err
	}
	return fd, nil
}
