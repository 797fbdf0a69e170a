// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/loop"
)

const (
	// maxTaken is how many more sockets are tried where a delivery's port
	// serves the same client and application already.
	maxTaken = 8
	// unanswered is after how long a delivery's SYN is sent from another port:
	// it may have met a socket of the same four-tuple that nobody told us of.
	// What is answered at all is answered at once, on lo.
	unanswered = time.Second
	// maxPorts is how many ports a delivery has. The last one has the rest of
	// ConnectTimeout.
	//
	// A listener whose queue is full drops SYNs too, and must not fare worse by
	// this. It is asked after 0, 1, 2, 3, 4, 6 and 10 s, and by the kernel alone
	// would be after 0, 1, 3 and 7 s: what is dropped leaves nothing behind that
	// another port would be without. And it never gets two connections for one,
	// since a port is given up before the next one is tried.
	maxPorts = 4
	// maxLooks bounds the looks at pods' listeners that run at once on a node.
	maxLooks = 2
)

// Deliveries counts what is odd about deliveries to applications.
type Deliveries struct {
	Again  atomic.Uint64 // SYNs that went unanswered and were sent from another port
	Marked atomic.Uint64 // deliveries that timed out since the listener has a mark of its own
}

// Deliveries returns the tunnel's counters.
func (t *Tunnel) Deliveries() *Deliveries { return &t.deliveries }

// Listener is an application's listening socket.
type Listener struct {
	Addr   netip.AddrPort
	Mark   uint32
	Cookie uint64 // no other socket of the machine ever has it
}

// delivery is a connection's way to the application.
type delivery struct {
	pod    *Pod
	w      *worker
	client netip.Addr // as whom the application sees it
	dst    netip.AddrPort
	to     deliverer

	timer  *loop.Timer
	giveUp time.Time // zero: nothing was sent yet
	ports  uint8     // that were tried
	taken  uint8     // ports that served the same client already
	over   bool      // it is connected, or was given up
}

// deliverer is the connection that a delivery is for. It has the socket.
type deliverer interface {
	// gone reports whether there is nobody to deliver to any more. It ends a
	// connection whose client has gone meanwhile.
	gone() bool
	// hold takes a socket whose connect is under way.
	hold(fd int) error
	// drop closes the socket that it holds, if any, and reports false where that
	// has been answered.
	drop() bool
	// holds reports whether it holds a socket.
	holds() bool
	// established: the socket that it holds is connected already.
	established()
	// undeliverable ends the connection.
	undeliverable(why telemetry.Reason, detail string)
}

// start takes a delivery socket and connects it to the application.
func (d *delivery) start() {
	v6 := d.dst.Addr().Is6()
	if fd, ok := d.pod.Sockets.Take(v6); ok {
		d.deliver(fd)
		return
	}
	d.pod.Sockets.Wait(v6, func(fd int, err error) {
		posted := d.w.Loop.Post(func() {
			switch {
			case err == nil:
				d.deliver(fd)
			case d.over || d.to.gone():
			default:
				d.without(err)
			}
		})
		if !posted && err == nil {
			unix.Close(fd)
		}
	})
}

// without goes on where there is no socket for another try.
func (d *delivery) without(err error) {
	if !d.to.holds() {
		d.to.undeliverable(telemetry.ReasonLimit, err.Error())
		return
	}
	d.await() // what was sent may still be answered
}

func (d *delivery) deliver(fd int) {
	if d.over || d.to.gone() || !d.to.drop() {
		unix.Close(fd) // too late, or the answer has come
		return
	}
	if t := d.pod.t; t.scarce(fd) {
		unix.Close(fd)
		t.limits.descriptors.Add(1)
		d.without(errNoDescriptors)
		return
	}
	err := d.pod.Sockets.Deliver(fd, d.client, d.dst, d.pod.tuples.avoid(d.client, d.dst))
	if errors.Is(err, unix.EADDRNOTAVAIL) && d.taken < maxTaken {
		d.taken++ // its port serves this client already
		unix.Close(fd)
		d.start()
		return
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		d.unreachable(err)
		return
	}
	if err := d.to.hold(fd); err != nil {
		refuse(fd)
		d.to.undeliverable(telemetry.ReasonLimit, err.Error())
		return
	}
	if d.ports++; d.ports > 1 {
		d.pod.t.deliveries.Again.Add(1)
	}
	if err == nil {
		d.to.established()
		return
	}
	if d.giveUp.IsZero() {
		d.giveUp = time.Now().Add(d.pod.t.cfg.ConnectTimeout)
	}
	d.await()
}

// await waits for the answer to a SYN.
func (d *delivery) await() {
	left := time.Until(d.giveUp)
	if d.ports < maxPorts && left > unanswered {
		d.timer = d.w.Loop.After(unanswered, d.start)
		return
	}
	d.timer = d.w.Loop.After(left, d.timedOut)
}

// stop ends it: the connection is made, or has ended.
func (d *delivery) stop() {
	d.over = true
	d.timer.Stop()
}

// timedOut gives up. A listener with a mark of its own gives it to what it
// accepts, whose answers then do not find back to lo: where there is one, it is
// named. The look at the pod's listeners runs in a goroutine. It is left out
// while there are enough of them.
func (d *delivery) timedOut() {
	p := d.pod
	t := p.t
	select {
	case t.looks <- struct{}{}:
	default:
		d.unreachable(unix.ETIMEDOUT)
		return
	}
	started := p.start(func() {
		l, found, err := p.Sockets.MarkedListener(d.dst)
		<-t.looks
		if err != nil {
			t.cfg.Logger.Warn("look at a pod's listeners, after a delivery timed out", "pod", p.Key, "err", err)
		}
		d.w.Loop.Post(func() {
			switch {
			case d.over || d.to.gone():
			case found:
				t.deliveries.Marked.Add(1)
				p.name(l)
				d.to.undeliverable(telemetry.ReasonTimeout, fmt.Sprintf(
					"connect to the application at %s: its listener has a mark of its own (SO_MARK %#x), so that its answers do not reach the tunnel", d.dst, l.Mark))
			default:
				d.unreachable(unix.ETIMEDOUT)
			}
		})
	})
	if !started {
		<-t.looks
		d.unreachable(unix.ETIMEDOUT)
	}
}

// unreachable ends the connection with the reason of an error of connect.
func (d *delivery) unreachable(err error) {
	why := telemetry.ReasonUnreachable
	var errno syscall.Errno
	if errors.As(err, &errno) {
		why = errnoReason(errno)
	}
	d.to.undeliverable(why, fmt.Sprintf("connect to the application at %s: %v", d.dst, err))
}

// maxNamed bounds the listeners of a pod that are named in the log.
const maxNamed = 64

// name names a listener with a mark of its own, once.
func (p *Pod) name(l Listener) {
	p.mu.Lock()
	_, known := p.named[l.Cookie]
	if !known && len(p.named) < maxNamed {
		if p.named == nil {
			p.named = map[uint64]struct{}{}
		}
		p.named[l.Cookie] = struct{}{}
	} else {
		known = true
	}
	p.mu.Unlock()
	if !known {
		p.t.cfg.Logger.Warn("an application's listener has a mark of its own: nobody reaches it through the tunnel",
			"pod", p.Key, "listener", l.Addr.String(), "mark", fmt.Sprintf("%#x", l.Mark),
			"hint", "have the application not set SO_MARK on the socket that it listens on; on those that it accepts it is refused (EPERM)")
	}
}
