// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// netConn is a socket in Go's poller, for the time of a connect and a
// handshake: crypto/tls wants a net.Conn. Take gives the descriptor to an
// event loop.
type netConn struct {
	*os.File
	local, remote netip.AddrPort
}

// LocalAddr is net.Conn's.
func (c *netConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.local) }

// RemoteAddr is net.Conn's.
func (c *netConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// newNetConn wraps fd, which must be non-blocking, and owns it.
func newNetConn(fd int, local, remote netip.AddrPort) *netConn {
	return &netConn{File: os.NewFile(uintptr(fd), "tunnel"), local: local, remote: remote}
}

// take returns a descriptor of the same socket that nobody but the caller
// owns, and closes the netConn. (File.Fd would make the socket blocking.)
func (c *netConn) take() (int, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	if cerr := rc.Control(func(raw uintptr) { fd, err = unix.FcntlInt(raw, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		err = cerr
	}
	c.Close()
	if err != nil {
		return -1, fmt.Errorf("duplicate descriptor: %w", err)
	}
	return fd, nil
}

// connect connects fd and owns it. Its errors wrap a syscall.Errno, or
// os.ErrDeadlineExceeded after timeout.
func connect(ctx context.Context, fd int, remote netip.AddrPort, timeout time.Duration) (*netConn, error) {
	var sa unix.Sockaddr
	if remote.Addr().Is4() {
		sa = &unix.SockaddrInet4{Port: int(remote.Port()), Addr: remote.Addr().As4()}
	} else {
		sa = &unix.SockaddrInet6{Port: int(remote.Port()), Addr: remote.Addr().As16()}
	}
	err := unix.Connect(fd, sa)
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return nil, fmt.Errorf("connect to %s: %w", remote, err)
	}
	c := newNetConn(fd, netip.AddrPort{}, remote)
	if err != nil {
		err = c.awaitConnected(ctx, timeout)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to %s: %w", remote, err)
	}
	return c, nil
}

func (c *netConn) awaitConnected(ctx context.Context, timeout time.Duration) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if err := c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	var failed error
	err = rc.Write(func(fd uintptr) bool {
		n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			failed = err
			return true
		}
		if n != 0 {
			failed = syscall.Errno(n)
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return err == nil // else it is still connecting
	})
	if err == nil {
		err = failed
	}
	if err == nil {
		err = c.SetWriteDeadline(time.Time{})
	}
	return err
}

// Bounds on what a peer that was refused is listened to for.
const (
	lastWords = time.Second
	maxUnread = 256 << 10 // bytes; it may have sent its first window of data
)

// part closes the connection so that what was said last, an alert, arrives. Closed
// over unread bytes the kernel would send a reset, and forget what it has to send
// again if it is lost on the way: so writing ends first, and what the peer has sent
// is read away, until it ends too, or for as long and as much as is bearable. It
// waits, at most until ctx ends.
func (c *netConn) part(ctx context.Context) {
	defer c.Close()
	rc, err := c.SyscallConn()
	if err != nil {
		return
	}
	if cerr := rc.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_WR) }); cerr != nil || err != nil {
		return // it is closed already
	}
	if c.SetReadDeadline(time.Now().Add(lastWords)) != nil {
		return
	}
	defer context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()
	var unread [4096]byte
	for n := 0; n < maxUnread; {
		got, err := c.Read(unread[:])
		if err != nil {
			return
		}
		n += got
	}
}
