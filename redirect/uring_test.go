// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// linux/io_uring.h.
const (
	uringSQPoll     = 1 << 1 // IORING_SETUP_SQPOLL
	uringSingleMmap = 1 << 0 // IORING_FEAT_SINGLE_MMAP
	uringGetEvents  = 1 << 0 // IORING_ENTER_GETEVENTS
	uringWakeup     = 1 << 1 // IORING_ENTER_SQ_WAKEUP
	uringNeedWakeup = 1 << 0 // IORING_SQ_NEED_WAKEUP
	uringOffSQEs    = 0x10000000
	uringOpConnect  = 16
	uringOpSocket   = 45 // since 5.19
)

// uringParams is struct io_uring_params.
type uringParams struct {
	SQEntries, CQEntries, Flags, SQThreadCPU, SQThreadIdle, Features, WQ uint32
	_                                                                    [3]uint32
	SQ                                                                   struct {
		Head, Tail, Mask, Entries, Flags, Dropped, Array, _ uint32
		_                                                   uint64
	}
	CQ struct {
		Head, Tail, Mask, Entries, Overflow, CQEs, Flags, _ uint32
		_                                                   uint64
	}
}

// uringSQE is struct io_uring_sqe.
type uringSQE struct {
	Opcode, Flags uint8
	IOPrio        uint16
	FD            int32
	Off, Addr     uint64
	Len, RWFlags  uint32
	UserData      uint64
	_             [3]uint64
}

// uring is an io_uring of one request at a time.
type uring struct {
	fd         int
	p          uringParams
	ring, sqes []byte
}

// newURing makes one on the calling thread: what its kernel thread does is done
// in that one's namespaces and cgroup.
func newURing(flags uint32) (*uring, error) {
	u := &uring{p: uringParams{Flags: flags, SQThreadIdle: 1000}}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&u.p)), 0)
	if errno != 0 {
		return nil, errno
	}
	u.fd = int(fd)
	if u.p.Features&uringSingleMmap == 0 {
		return nil, errors.New("two rings")
	}
	var err error
	size := max(u.p.SQ.Array+4*u.p.SQEntries, u.p.CQ.CQEs+16*u.p.CQEntries)
	if u.ring, err = unix.Mmap(u.fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, err
	}
	u.sqes, err = unix.Mmap(u.fd, uringOffSQEs, int(64*u.p.SQEntries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	return u, err
}

func (u *uring) close() {
	unix.Munmap(u.ring)
	unix.Munmap(u.sqes)
	unix.Close(u.fd)
}

func (u *uring) word(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&u.ring[off])) }

// do has one request done, and returns its result.
func (u *uring) do(e uringSQE) (int32, error) {
	tail := atomic.LoadUint32(u.word(u.p.SQ.Tail))
	index := tail & *u.word(u.p.SQ.Mask)
	*(*uringSQE)(unsafe.Pointer(&u.sqes[64*index])) = e
	*u.word(u.p.SQ.Array + 4*index) = index
	atomic.StoreUint32(u.word(u.p.SQ.Tail), tail+1)
	submit, flags := uintptr(1), uintptr(0)
	if u.p.Flags&uringSQPoll != 0 {
		submit = 0
	}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if u.p.Flags&uringSQPoll != 0 {
			flags = 0
			if atomic.LoadUint32(u.word(u.p.SQ.Flags))&uringNeedWakeup != 0 {
				flags = uringWakeup
			}
		}
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(u.fd), submit, 0, flags, 0, 0)
		if errno != 0 && errno != unix.EINTR && errno != unix.EAGAIN {
			return 0, fmt.Errorf("io_uring_enter: %w", errno)
		}
		if errno == 0 {
			submit -= min(submit, n)
		}
		head := atomic.LoadUint32(u.word(u.p.CQ.Head))
		if head != atomic.LoadUint32(u.word(u.p.CQ.Tail)) {
			cqe := u.p.CQ.CQEs + 16*(head&*u.word(u.p.CQ.Mask))
			res := int32(*u.word(cqe + 8))
			atomic.StoreUint32(u.word(u.p.CQ.Head), head+1)
			return res, nil
		}
		runtime.Gosched()
	}
	return 0, unix.ETIMEDOUT
}

// connect makes a socket and connects it, both by the ring.
func (u *uring) connect(v6 bool, raw unsafe.Pointer, size uintptr) (int, error) {
	family := int32(unix.AF_INET)
	if v6 {
		family = unix.AF_INET6
	}
	fd, err := u.do(uringSQE{Opcode: uringOpSocket, FD: family, Off: unix.SOCK_STREAM, Len: unix.IPPROTO_TCP})
	if err != nil || fd < 0 {
		return -1, errors.Join(err, unix.Errno(-min(fd, 0)))
	}
	res, err := u.do(uringSQE{Opcode: uringOpConnect, FD: fd, Off: uint64(size), Addr: uint64(uintptr(raw))})
	if err == nil && res < 0 {
		err = unix.Errno(-res)
	}
	return int(fd), err
}

// An io_uring connects without the system call, and on a thread of the kernel's
// where it is told to: the hooks see it all the same.
func TestIOUringIsCarried(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		w.must(w.node.SetMeshCIDRs(append(prefixes("10.98.0.0/16"), prefixes("fd98::/16")...)))
		for name, flags := range map[string]uint32{"plain": 0, "SQPOLL": uringSQPoll} {
			for what, dst := range map[string]struct {
				to      uint16
				address [16]byte
			}{"carried": {8080, f.remote.As16()}, "unknown": {8080, f.remote.Next().As16()}} {
				var fd int
				var err error
				var raw4 unix.RawSockaddrInet4
				var raw6 unix.RawSockaddrInet6
				var pin runtime.Pinner // the kernel reads them
				pin.Pin(&raw4)
				pin.Pin(&raw6)
				port := dst.to<<8 | dst.to>>8
				raw4.Family, raw4.Port = unix.AF_INET, port
				copy(raw4.Addr[:], dst.address[12:])
				raw6.Family, raw6.Port, raw6.Addr = unix.AF_INET6, port, dst.address
				n := w.counted(func() {
					w.in(w.pod, func() error {
						u, uerr := newURing(flags)
						if errors.Is(uerr, unix.EPERM) || errors.Is(uerr, unix.ENOSYS) {
							t.Skipf("this machine has no io_uring (kernel.io_uring_disabled): %v", uerr)
						}
						if uerr != nil {
							return uerr
						}
						defer u.close()
						if f.v6 {
							fd, err = u.connect(true, unsafe.Pointer(&raw6), unsafe.Sizeof(raw6))
						} else {
							fd, err = u.connect(false, unsafe.Pointer(&raw4), unsafe.Sizeof(raw4))
						}
						return nil
					})
				})
				pin.Unpin()
				w.closing(fd)
				if what == "unknown" {
					if !errors.Is(err, unix.ECONNREFUSED) || n["connect_refused_unknown"] != 1 {
						t.Errorf("%s, %s: %v, counted %v", name, what, err, n)
					}
					continue
				}
				if err != nil || n["connect_carried"] != 1 {
					t.Fatalf("%s: connect: %v, counted %v", name, err, n)
				}
				w.must(limit(fd))
				c := w.accept(w.listeners[f.outbound])
				if local(c) != at(f.remote, 8080) {
					t.Errorf("%s: the tunnel sees the destination %s", name, local(c))
				}
				w.exchange(fd, c)
				w.tryWays(name, w.pod, fd, unix.EPERM)
			}
		}
	})
}
