// SPDX-License-Identifier: Apache-2.0

// Package socket makes the tunnel's sockets in pods' network namespaces:
// listeners, dials to peers, and deliveries to applications. They are raw
// descriptors, which belong to whom they are given to.
//
// A setns on a fresh thread is most of the cost of a connection, so a Maker has
// one thread that hops between namespaces, and keeps a stock of delivery
// sockets for the pods that need them. Who makes a Maker closes it.
package socket

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// ErrClosed is returned by a Maker, or a Stock, that has been closed.
var ErrClosed = errors.New("socket maker is closed")

// backlog is how many connections a listener's queue holds. The kernel takes
// the smaller of it and net.core.somaxconn of the pod's namespace (4096).
const backlog = 4096

// hbonePort is where other nodes' tunnels connect. It faces no application, and
// what is said there last (an alert, GOAWAY) has to arrive.
const hbonePort = 15008

// outboundPort is where the pod's own applications are steered to, over lo.
const outboundPort = 15001

// carriedMark is MARK of bpf/culvert.h: routed to lo in a pod.
const carriedMark = 0x53a

// Maker makes sockets.
type Maker struct {
	own  func(fd int) error
	jobs chan job
	done chan struct{}
	once sync.Once
	stop chan struct{}

	stocked budget // delivery sockets in all stocks of the node
}

type job struct {
	ns   *netns.NS // nil: home
	do   func() error
	done chan<- error
}

// New starts the Maker's thread. own marks a descriptor as the tunnel's.
func New(own func(fd int) error) (*Maker, error) {
	m := &Maker{own: own, jobs: make(chan job), done: make(chan struct{}), stop: make(chan struct{})}
	m.stocked.limit = maxStocked
	go m.run()
	return m, nil
}

// homeAfter is how long the thread stays in a namespace that nobody needs a
// socket of. It keeps the namespace alive.
const homeAfter = 2 * time.Second

// run is the thread. It stays locked, and dies with the goroutine, so that no
// other goroutine ever runs in a pod's namespace.
func (m *Maker) run() {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread stands for the process in /proc, and does not die.
		// Hold it, so that the work is done on another.
		defer runtime.UnlockOSThread()
		other := make(chan struct{})
		go func() { defer close(other); m.run() }()
		<-other
		return
	}
	defer close(m.done)
	home, err := netns.Current()
	if err == nil {
		defer home.Close()
	}
	in := home
	enter := func(ns *netns.NS) error {
		if ns == nil {
			ns = home
		}
		if ns == nil || ns == in {
			return nil
		}
		if err := ns.Enter(); err != nil {
			return err
		}
		in = ns
		return nil
	}
	idle := time.NewTimer(homeAfter)
	defer idle.Stop()
	for {
		select {
		case <-m.stop:
			return
		case <-idle.C:
			_ = enter(nil) // else after the next job
			continue
		case j := <-m.jobs:
			err := enter(j.ns)
			if err == nil {
				err = j.do()
			}
			j.done <- err
		}
		idle.Reset(homeAfter)
	}
}

// Close ends the thread and waits for it. Sockets that were made stay.
func (m *Maker) Close() error {
	m.once.Do(func() { close(m.stop) })
	<-m.done
	return nil
}

// in runs do on the thread in a namespace.
func (m *Maker) in(ns *netns.NS, do func() error) error {
	done := make(chan error, 1)
	select {
	case m.jobs <- job{ns, do, done}:
		return <-done
	case <-m.stop:
		return ErrClosed
	}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is6() {
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

// options sets socket options and stops at the first that fails.
type options struct {
	fd  int
	err error
}

func (o *options) set(what string, level, name, value int) {
	if o.err != nil {
		return
	}
	if err := unix.SetsockoptInt(o.fd, level, name, value); err != nil {
		o.err = fmt.Errorf("set %s: %w", what, err)
	}
}

func (o *options) transparent(v6 bool) {
	if v6 {
		o.set("IPV6_TRANSPARENT", unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
	} else {
		o.set("IP_TRANSPARENT", unix.SOL_IP, unix.IP_TRANSPARENT, 1)
	}
}

// onLo is for connections on lo, where there is no network whose pace is to be found:
// the cheapest congestion control, which each kernel has. A listener's connections
// have it from the listener, and the application's ends from the pod's route. Without
// it all is as well, only dearer.
func (o *options) onLo() {
	if o.err == nil {
		_ = unix.SetsockoptString(o.fd, unix.SOL_TCP, unix.TCP_CONGESTION, "reno")
	}
}

// resetOnExit makes a killed daemon a reset for the application, and not the
// end of a stream that looks complete. A clean close unsets it.
func (o *options) resetOnExit() {
	if o.err == nil {
		if err := unix.SetsockoptLinger(o.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			o.err = fmt.Errorf("set SO_LINGER: %w", err)
		}
	}
}

// socket makes a TCP socket of the tunnel's own in the calling thread's
// namespace: plain TCP, never MPTCP.
func (m *Maker) socket(v6 bool) (fd int, err error) {
	af := unix.AF_INET
	if v6 {
		af = unix.AF_INET6
	}
	fd, err = unix.Socket(af, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := m.own(fd); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Listen opens a listener in a pod's namespace. It accepts connections to any
// address (sk_lookup gives them to it), and they reset when they are not closed
// cleanly; not so on port 15008, which faces no application.
func (m *Maker) Listen(ns *netns.NS, addr netip.AddrPort, transparent bool) (fd int, err error) {
	err = m.in(ns, func() error {
		fd, err = m.listen(addr, transparent)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("listen on %s in the pod: %w", addr, err)
	}
	return fd, nil
}

func (m *Maker) listen(addr netip.AddrPort, transparent bool) (int, error) {
	v6 := addr.Addr().Is6()
	fd, err := m.socket(v6)
	if err != nil {
		return -1, err
	}
	o := options{fd: fd}
	o.set("SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	o.set("TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1)
	if v6 {
		o.set("IPV6_V6ONLY", unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if transparent { // else no SYN-ACK leaves for an address that is not ours
		o.transparent(v6)
	}
	if addr.Port() != hbonePort {
		o.resetOnExit()
	}
	if addr.Port() == outboundPort {
		o.onLo()
	}
	if o.err == nil {
		o.err = os.NewSyscallError("bind", unix.Bind(fd, sockaddr(addr)))
	}
	if o.err == nil {
		o.err = os.NewSyscallError("listen", unix.Listen(fd, backlog))
	}
	if o.err != nil {
		unix.Close(fd)
		return -1, o.err
	}
	return fd, nil
}

// Dial makes a socket in a pod's namespace, bound to its address src and to a
// port of our range, not connected yet.
func (m *Maker) Dial(ns *netns.NS, src netip.Addr) (fd int, err error) {
	err = m.in(ns, func() error {
		fd, err = m.dial(src)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("make socket for a tunnel from %s: %w", src, err)
	}
	return fd, nil
}

func (m *Maker) dial(src netip.Addr) (int, error) {
	fd, err := m.socket(src.Is6())
	if err != nil {
		return -1, err
	}
	o := options{fd: fd}
	o.set("TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1)
	if o.err == nil {
		o.err = bind(fd, src, nil)
	}
	if o.err != nil {
		unix.Close(fd)
		return -1, o.err
	}
	return fd, nil
}
