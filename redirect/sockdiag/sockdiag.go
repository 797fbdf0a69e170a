// SPDX-License-Identifier: Apache-2.0

// Package sockdiag lists the TCP sockets of a network namespace, and ends one,
// through the kernel's NETLINK_SOCK_DIAG (linux/inet_diag.h). It knows nothing
// of pods and decides nothing. Every call opens and closes its own descriptor.
//
// It needs CAP_NET_ADMIN: without it the kernel leaves the marks out.
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// Sets of states for List.
const (
	Listening = 1 << unix.BPF_TCP_LISTEN
	// Connected are those in which a socket may still carry bytes, those of a
	// connection that is being made among them. TIME_WAIT and CLOSE are not.
	Connected = 1<<unix.BPF_TCP_ESTABLISHED | 1<<unix.BPF_TCP_SYN_SENT | 1<<unix.BPF_TCP_SYN_RECV |
		1<<unix.BPF_TCP_FIN_WAIT1 | 1<<unix.BPF_TCP_FIN_WAIT2 | 1<<unix.BPF_TCP_CLOSE_WAIT |
		1<<unix.BPF_TCP_LAST_ACK | 1<<unix.BPF_TCP_CLOSING
)

// Socket is a TCP socket as the kernel tells of it. Addresses of IPv4 are plain
// ones, also those of a dual-stack socket.
type Socket struct {
	Local, Remote netip.AddrPort
	State         uint8  // TCP_ESTABLISHED and so on
	Device        uint32 // that it is bound to; 0: none
	Mark          uint32
	Inode         uint32 // 0: nobody holds it, for one while it waits to be accepted
	UID           uint32
	Cookie        uint64
	Stored        bool // it is in Query.Storage
}

// Query says which sockets are asked for.
type Query struct {
	States  uint32 // 1<<TCP_ESTABLISHED and so on
	Storage int    // descriptor of a BPF_MAP_TYPE_SK_STORAGE map for Socket.Stored; 0: none
}

// ErrNoDestroy is Destroy's where the kernel cannot.
var ErrNoDestroy = errors.New("this kernel cannot end another process's socket: it is built without CONFIG_INET_DIAG_DESTROY")

const (
	// maxSockets bounds what List returns: 120 bytes each.
	maxSockets = 1 << 20
	// readBuffer holds a message of a dump: the kernel makes them of 32 KiB at
	// most (netlink_dump in net/netlink/af_netlink.c).
	readBuffer = 64 << 10
	// answerWait bounds the wait for each message.
	answerWait = 5 * time.Second
)

// linux/inet_diag.h, sock_diag.h. None is in x/sys.
const (
	sockDiagByFamily = 20
	sockDestroy      = 21

	reqStorages      = 2 // INET_DIAG_REQ_SK_BPF_STORAGES
	storageReqMapFD  = 1 // SK_DIAG_BPF_STORAGE_REQ_MAP_FD
	attrMark         = 15
	attrStorages     = 20
	sizeofRequest    = 56 // inet_diag_req_v2
	sizeofMessage    = 72 // inet_diag_msg
	sizeofAttrHeader = unix.SizeofNlAttr
)

// List lists the sockets of a namespace that are in one of states, of both
// families.
func List(ns *netns.NS, states uint32) ([]Socket, error) {
	var out []Socket
	err := Each(ns, Query{States: states}, func(s Socket) error {
		if len(out) == maxSockets {
			return fmt.Errorf("more than %d sockets", maxSockets)
		}
		out = append(out, s)
		return nil
	})
	return out, err
}

// Each calls f for each socket of a namespace that q asks for, of both families,
// until f returns an error. It runs f on another goroutine. What comes or goes
// meanwhile may be missed or told twice.
func Each(ns *netns.NS, q Query, f func(Socket) error) error {
	err := ns.Do(func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.close()
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			if err := c.dump(family, q, f); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list sockets: %w", err)
	}
	return nil
}

// Destroy ends a socket that was listed: its process gets ECONNABORTED, its peer
// a reset. One that has gone already is no error.
func Destroy(ns *netns.NS, s Socket) error {
	err := ns.Do(func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.close()
		return c.destroy(s)
	})
	if err != nil {
		return fmt.Errorf("end connection %s - %s: %w", s.Local, s.Remote, err)
	}
	return nil
}

// conn is a netlink socket.
type conn struct {
	fd  int
	seq uint32
	buf []byte
}

func dial() (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("ask the kernel: %w", os.NewSyscallError("socket", err))
	}
	wait := unix.NsecToTimeval(answerWait.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("ask the kernel: %w", os.NewSyscallError("setsockopt", err))
	}
	return &conn{fd: fd, buf: make([]byte, readBuffer)}, nil
}

func (c *conn) close() { unix.Close(c.fd) }

func (c *conn) send(kind uint16, flags int, request []byte) error {
	c.seq++
	b := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(request))
	binary.NativeEndian.PutUint32(b[0:], uint32(cap(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], uint16(unix.NLM_F_REQUEST|flags))
	binary.NativeEndian.PutUint32(b[8:], c.seq)
	b = append(b, request...)
	if err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask the kernel: %w", os.NewSyscallError("sendto", err))
	}
	return nil
}

// receive calls f for each message that answers the last request, until the end
// of a dump, an acknowledgement, or an error.
func (c *conn) receive(f func(body []byte) error) error {
	for {
		n, from, err := unix.Recvfrom(c.fd, c.buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN {
			return fmt.Errorf("the kernel has not answered within %s", answerWait)
		}
		if err != nil {
			return fmt.Errorf("read the kernel's answer: %w", os.NewSyscallError("recvfrom", err))
		}
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue // not the kernel's
		}
		for b := c.buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.SizeofNlMsghdr || size > len(b) {
				return errors.New("the kernel's answer is cut short")
			}
			kind, seq, body := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:]), b[unix.SizeofNlMsghdr:size]
			b = b[min(len(b), align(size)):]
			if seq != c.seq {
				continue
			}
			switch kind {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				// Both begin with a negative errno, or 0.
				if len(body) >= 4 {
					if errno := int32(binary.NativeEndian.Uint32(body)); errno < 0 {
						return unix.Errno(-errno)
					}
				}
				return nil
			default:
				if err := f(body); err != nil {
					return err
				}
			}
		}
	}
}

func align(n int) int { return (n + 3) &^ 3 }

func (c *conn) dump(family uint8, q Query, f func(Socket) error) error {
	request := make([]byte, sizeofRequest)
	request[0], request[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(request[4:], q.States)
	if q.Storage != 0 {
		request = appendAttr(request, reqStorages, appendAttr(nil, storageReqMapFD, binary.NativeEndian.AppendUint32(nil, uint32(q.Storage))))
	}
	if err := c.send(sockDiagByFamily, unix.NLM_F_DUMP, request); err != nil {
		return err
	}
	err := c.receive(func(body []byte) error {
		s, err := parse(body)
		if err != nil {
			return err
		}
		return f(s)
	})
	if errors.Is(err, unix.ENOENT) { // family or protocol
		if family == unix.AF_INET6 {
			return nil // a kernel without IPv6
		}
		return errors.New("this kernel does not tell of TCP sockets: it lacks CONFIG_INET_DIAG (module tcp_diag)")
	}
	return err
}

func (c *conn) destroy(s Socket) error {
	request := make([]byte, sizeofRequest)
	// A dual-stack socket that speaks IPv4 is found by its IPv4 addresses.
	request[0], request[1] = unix.AF_INET, unix.IPPROTO_TCP
	if s.Local.Addr().Is6() {
		request[0] = unix.AF_INET6
	}
	binary.NativeEndian.PutUint32(request[4:], 1<<s.State)
	binary.BigEndian.PutUint16(request[8:], s.Local.Port())
	binary.BigEndian.PutUint16(request[10:], s.Remote.Port())
	copy(request[12:28], s.Local.Addr().AsSlice())
	copy(request[28:44], s.Remote.Addr().AsSlice())
	binary.NativeEndian.PutUint32(request[44:], s.Device)
	binary.NativeEndian.PutUint32(request[48:], uint32(s.Cookie))
	binary.NativeEndian.PutUint32(request[52:], uint32(s.Cookie>>32))
	if err := c.send(sockDestroy, unix.NLM_F_ACK, request); err != nil {
		return err
	}
	err := c.receive(func([]byte) error { return nil })
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		return nil // gone, or the tuple is another's by now
	case errors.Is(err, unix.EOPNOTSUPP):
		return ErrNoDestroy
	}
	return err
}

func appendAttr(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(sizeofAttrHeader+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

// parse reads struct inet_diag_msg and the attributes behind it.
func parse(b []byte) (Socket, error) {
	if len(b) < sizeofMessage {
		return Socket{}, errors.New("the kernel's answer is cut short")
	}
	addr := func(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b)) }
	if b[0] == unix.AF_INET6 {
		addr = func(b []byte) netip.Addr { return netip.AddrFrom16([16]byte(b)).Unmap() }
	}
	s := Socket{
		State:  b[1],
		Local:  netip.AddrPortFrom(addr(b[8:24]), binary.BigEndian.Uint16(b[4:])),
		Remote: netip.AddrPortFrom(addr(b[24:40]), binary.BigEndian.Uint16(b[6:])),
		Device: binary.NativeEndian.Uint32(b[40:]),
		Cookie: uint64(binary.NativeEndian.Uint32(b[44:])) | uint64(binary.NativeEndian.Uint32(b[48:]))<<32,
		UID:    binary.NativeEndian.Uint32(b[64:]),
		Inode:  binary.NativeEndian.Uint32(b[68:]),
	}
	for b = b[sizeofMessage:]; len(b) >= sizeofAttrHeader; {
		size := int(binary.NativeEndian.Uint16(b))
		if size < sizeofAttrHeader || size > len(b) {
			return Socket{}, errors.New("an attribute of the kernel's answer is cut short")
		}
		value := b[sizeofAttrHeader:size]
		switch binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER) {
		case attrMark:
			if len(value) >= 4 {
				s.Mark = binary.NativeEndian.Uint32(value)
			}
		case attrStorages:
			s.Stored = len(value) > 0
		}
		b = b[min(len(b), align(size)):]
	}
	return s, nil
}
