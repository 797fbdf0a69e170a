// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxIovecs is UIO_MAXIOV of linux/uio.h.
const maxIovecs = 1024

// Recv reads from a socket into iov with one recvmsg that never waits:
// O_NONBLOCK belongs to the description, which others may share, so each call
// says MSG_DONTWAIT itself. It returns 0 and no error at the end of the stream,
// and unix.EAGAIN when nothing is there. A call that returns at once does not
// need the scheduler's knowledge, hence the raw one.
func Recv(fd int, iov []unix.Iovec) (int, syscall.Errno) { return msg(unix.SYS_RECVMSG, fd, iov, 0) }

// Peek is Recv that leaves in the socket what it reads.
func Peek(fd int, iov []unix.Iovec) (int, syscall.Errno) {
	return msg(unix.SYS_RECVMSG, fd, iov, unix.MSG_PEEK)
}

// Discard takes as many bytes from a TCP socket as iov has room for, and copies
// none (MSG_TRUNC, tcp(7)): what was peeked at and used.
func Discard(fd int, iov []unix.Iovec) (int, syscall.Errno) {
	return msg(unix.SYS_RECVMSG, fd, iov, unix.MSG_TRUNC)
}

// Send writes iov to a socket with one sendmsg that never waits.
func Send(fd int, iov []unix.Iovec) (int, syscall.Errno) {
	return msg(unix.SYS_SENDMSG, fd, iov, unix.MSG_NOSIGNAL)
}

// msg is recvmsg or sendmsg.
func msg(call uintptr, fd int, iov []unix.Iovec, flags uintptr) (int, syscall.Errno) {
	m := unix.Msghdr{Iov: &iov[0], Iovlen: uint64(min(len(iov), maxIovecs))}
	for {
		n, _, e := syscall.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&m)), flags|unix.MSG_DONTWAIT)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(n), 0
	}
}

// Accept takes one connection from a listener, not inherited by children and
// not blocking.
func Accept(fd int) (int, syscall.Errno) {
	for {
		n, _, e := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		if e == unix.EINTR || e == unix.ECONNABORTED {
			continue
		}
		if e != 0 {
			return -1, e
		}
		return int(n), 0
	}
}

// Advance takes n written bytes off the front of iov.
func Advance(iov []unix.Iovec, n int) []unix.Iovec {
	for n > 0 {
		l := int(iov[0].Len)
		if n < l {
			iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(iov[0].Base), n))
			iov[0].Len -= uint64(n)
			return iov
		}
		n -= l
		iov[0].Base = nil
		iov = iov[1:]
	}
	return iov
}
