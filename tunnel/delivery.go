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
	"github.com/culvert-mesh/culvert/tunnel/hbone"
	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/relay"
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

// delivery is how far a connection's way to the application has come.
type delivery struct {
	timer  *loop.Timer
	giveUp time.Time // zero: nothing was sent yet
	ports  uint8     // that were tried
	taken  uint8     // ports that served the same client already
}

// connect takes a delivery socket and connects it to the application.
func (i *inbound) connect() {
	in := i.trunk
	v6 := i.dst.Addr().Is6()
	if fd, ok := in.pod.Sockets.Take(v6); ok {
		i.deliver(fd)
		return
	}
	in.pod.Sockets.Wait(v6, func(fd int, err error) {
		posted := in.w.Loop.Post(func() {
			switch {
			case err == nil:
				i.deliver(fd)
			case i.relay == nil || i.relay.Disconnected():
				i.answer(503, telemetry.ReasonLimit, err.Error())
			default: // what was sent may still be answered
				i.await()
			}
		})
		if !posted && err == nil {
			unix.Close(fd)
		}
	})
}

func (i *inbound) deliver(fd int) {
	in := i.trunk
	switch {
	case i.done:
		unix.Close(fd)
		return
	case i.st.Closed() || in.trunk.Closed():
		unix.Close(fd)
		i.report(telemetry.ReasonReset, "by the source, before the application was reached")
		return
	case i.relay != nil && !i.relay.Disconnect():
		unix.Close(fd) // the answer has come
		return
	}
	client := in.remote.Addr()
	err := in.pod.Sockets.Deliver(fd, client, i.dst, in.pod.tuples.avoid(client, i.dst))
	if errors.Is(err, unix.EADDRNOTAVAIL) && i.delivery.taken < maxTaken {
		i.delivery.taken++ // its port serves this client already
		unix.Close(fd)
		i.connect()
		return
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		i.unreachable(err)
		return
	}
	if rerr := i.register(fd); rerr != nil {
		refuse(fd)
		i.answer(503, telemetry.ReasonLimit, rerr.Error())
		return
	}
	if i.delivery.ports++; i.delivery.ports > 1 {
		in.pod.t.deliveries.Again.Add(1)
	}
	if err == nil {
		i.relay.Established()
		return
	}
	if i.delivery.giveUp.IsZero() {
		i.delivery.giveUp = time.Now().Add(in.pod.t.cfg.ConnectTimeout)
	}
	i.await()
}

// register gives the relay, which the first socket makes, a socket.
func (i *inbound) register(fd int) error {
	if i.relay != nil {
		return i.relay.Reconnect(fd)
	}
	r, err := i.trunk.w.Connecting(fd, i)
	if err != nil {
		return err
	}
	i.relay = r
	r.Attach(i.trunk.trunk, i.st)
	return nil
}

// await waits for the answer to a SYN.
func (i *inbound) await() {
	left := time.Until(i.delivery.giveUp)
	if i.delivery.ports < maxPorts && left > unanswered {
		i.delivery.timer = i.trunk.w.Loop.After(unanswered, i.connect)
		return
	}
	i.delivery.timer = i.trunk.w.Loop.After(left, i.timedOut)
}

// Connected is relay.Owner's.
func (i *inbound) Connected(r *relay.Relay, err error) {
	i.delivery.timer.Stop()
	if err != nil {
		i.unreachable(err)
		return
	}
	if i.respond(hbone.ResponseFields(200, ""), false) {
		i.opened = true
		i.flow = i.trunk.pod.t.cfg.Recorder.Opened(i.record())
		r.Open()
	}
}

// timedOut gives up. A listener with a mark of its own gives it to what it
// accepts, whose answers then do not find back to lo: where there is one, it is
// named. The look at the pod's listeners runs in a goroutine. It is left out
// while there are enough of them.
func (i *inbound) timedOut() {
	p := i.trunk.pod
	t := p.t
	select {
	case t.looks <- struct{}{}:
	default:
		i.unreachable(unix.ETIMEDOUT)
		return
	}
	started := p.start(func() {
		l, found, err := p.Sockets.MarkedListener(i.dst)
		<-t.looks
		if err != nil {
			t.cfg.Logger.Warn("look at a pod's listeners, after a delivery timed out", "pod", p.Key, "err", err)
		}
		i.trunk.w.Loop.Post(func() {
			switch {
			case i.done || i.opened:
			case found:
				t.deliveries.Marked.Add(1)
				p.name(l)
				i.answer(503, telemetry.ReasonTimeout, fmt.Sprintf(
					"connect to the application at %s: its listener has a mark of its own (SO_MARK %#x), so that its answers do not reach the tunnel", i.dst, l.Mark))
			default:
				i.unreachable(unix.ETIMEDOUT)
			}
		})
	})
	if !started {
		<-t.looks
		i.unreachable(unix.ETIMEDOUT)
	}
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
			"hint", "have the application not set SO_MARK on the socket that it listens on; on those that it accepts it may")
	}
}

func (i *inbound) unreachable(err error) {
	why := telemetry.ReasonUnreachable
	var errno syscall.Errno
	if errors.As(err, &errno) {
		why = errnoReason(errno)
	}
	i.answer(503, why, fmt.Sprintf("connect to the application at %s: %v", i.dst, err))
}
