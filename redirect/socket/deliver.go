// SPDX-License-Identifier: Apache-2.0

package socket

import (
	"errors"
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
	// exclusive is how many ports are tried that no other socket of the same
	// address holds, and shared how many then, that others may hold too.
	exclusive = 32
	shared    = 32
)

// bind binds fd to a and a port of our range that avoid (nil: none) does not say
// true of.
//
// At first without SO_REUSEADDR, so that the kernel refuses a port that any
// other socket of the address holds: with it, a four-tuple that is in use would
// only be found out by connect, when the socket cannot be bound again. Set
// afterwards, it keeps the port free for an application's listener, which sets
// it too. Where all that were tried are held, most of them by TIME_WAIT, ports
// are shared: connect may then fail with EADDRNOTAVAIL.
func bind(fd int, a netip.Addr, avoid func(port uint16) bool) error {
	for try := range exclusive + shared {
		if try == exclusive {
			if err := setReuse(fd, 1); err != nil {
				return err
			}
		}
		port, ok := choose(avoid)
		if !ok {
			return fmt.Errorf("bind to %s: plaintext connections of this client have all ports of %d-%d: %w", a, firstPort, lastPort, unix.EADDRINUSE)
		}
		err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(a, port)))
		if err == nil {
			return setReuse(fd, 1)
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return fmt.Errorf("bind to %s: %w", a, err)
		}
	}
	return fmt.Errorf("bind to %s: no port of %d-%d is free, %d were tried: %w", a, firstPort, lastPort, exclusive+shared, unix.EADDRINUSE)
}

// choose returns a port of our range at random, or the next one that is not to
// be avoided.
func choose(avoid func(port uint16) bool) (port uint16, ok bool) {
	const n = lastPort - firstPort + 1
	first := rand.N(n)
	for i := range n {
		port = uint16(firstPort + (first+i)%n)
		if avoid == nil || !avoid(port) {
			return port, true
		}
	}
	return 0, false
}

func setReuse(fd, on int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, on); err != nil {
		return fmt.Errorf("set SO_REUSEADDR: %w", err)
	}
	return nil
}

// Deliver connects a delivery socket to the application at dst, from the
// client's address and a port of our range that avoid (nil: none) does not say
// true of: those by which it would meet another connection of the client's that
// ends in the pod. unix.EINPROGRESS means that it is under way. On lo it is often
// over when connect returns. ECONNREFUSED: nobody listens. EADDRNOTAVAIL: the
// port is shared, and already serves this client and dst; another socket will do.
func Deliver(fd int, client netip.Addr, dst netip.AddrPort, avoid func(port uint16) bool) error {
	client, addr := client.Unmap().WithZone(""), dst.Addr().Unmap()
	if client.Is4() != addr.Is4() {
		return fmt.Errorf("deliver from %s to %s: %w", client, dst, unix.EAFNOSUPPORT)
	}
	if client == addr {
		// Answers to the pod's own address come in by the device that has it,
		// says the route: one bound to lo would not hear them.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, 0); err != nil {
			return fmt.Errorf("unbind from lo: %w", err)
		}
	}
	if err := bind(fd, client, avoid); err != nil {
		return err
	}
	return unix.Connect(fd, sockaddr(netip.AddrPortFrom(addr, dst.Port())))
}

// delivery makes a delivery socket in the calling thread's namespace.
func (m *Maker) delivery(v6 bool) (int, error) {
	fd, err := m.socket(v6)
	if err != nil {
		return -1, err
	}
	o := options{fd: fd}
	o.set("TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1)
	o.set("SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, carriedMark)
	o.onLo()
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
