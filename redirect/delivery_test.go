// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/redirect/socket"
)

// A delivery that has the four-tuple of a live plaintext connection of the same
// client is that connection's, and not the listener's. Ports that are to be
// avoided are.
func TestMirroredTuple(t *testing.T) {
	both(t, func(w *world, f family) {
		const mirrored, free = 20000, 20001
		app := w.listen(w.pod, at(f.pod, 8080))
		// From before the enrolment, by a client that chose such a port.
		live, err := w.connect(w.outside, at(f.pod, 8080), func(fd int) error { return unix.Bind(fd, sockaddr(at(f.outside, mirrored))) })
		w.must(err)
		there := w.accept(app)
		w.exchange(live, there)
		w.start()
		stock := w.maker.Stock(w.pod)
		defer stock.Close()
		for range 16 {
			fd := w.take(stock, f.v6)
			err := socket.Deliver(fd, f.outside, at(f.pod, 8080), func(port uint16) bool { return port != free })
			w.must(finish(fd, err))
			c := w.accept(app)
			if p := peer(c); p != at(f.outside, free) {
				w.t.Fatalf("the application sees %s, want %s", p, at(f.outside, free))
			}
			// The tunnel's end resets, so that its port is free again.
			unix.Close(fd)
			if _, err := unix.Read(c, make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				w.t.Fatal(err)
			}
		}
		// The control: the mirrored port goes unanswered, also the second time.
		fd := w.take(stock, f.v6)
		if err := socket.Deliver(fd, f.outside, at(f.pod, 8080), func(port uint16) bool { return port != mirrored }); !errors.Is(err, unix.EINPROGRESS) {
			w.t.Fatalf("deliver from the mirrored port: %v, want it under way", err)
		}
		for deadline := time.Now().Add(10 * patience); ; {
			if poll(fd, unix.POLLIN|unix.POLLOUT, patience/4) {
				e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
				w.t.Fatalf("the mirrored port is answered: %v, %v", unix.Errno(e), err)
			}
			info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
			w.must(err)
			if info.Total_retrans > 0 {
				break
			}
			if time.Now().After(deadline) {
				w.t.Fatal("its SYN is not sent again")
			}
		}
		w.empty(app)
		w.exchange(live, there) // unharmed
	})
}

// Why deliveries are bound to lo: without it the kernel takes them for arrived by
// the device that has the pod's address, and so from outside.
func TestDeliveryWithoutDevice(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		stock := w.maker.Stock(w.pod)
		defer stock.Close()
		app := w.listen(w.pod, at(f.pod, 8080))
		unbound := func(port uint16) error {
			fd := w.take(stock, f.v6)
			w.must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, 0))
			return deliver(fd, f.outside, at(f.pod, port))
		}
		n := w.counted(func() {
			w.refused("a delivery that is not bound to lo", func() error { return unbound(8080) })
			w.must(unbound(15008)) // back in the tunnel
			w.accept(w.listeners[f.hbone])
		})
		if n["strict_refused"] != 1 || n["steer_hbone"] != 1 || n["steer_delivery"] != 0 {
			w.t.Errorf("counted %v", n)
		}
		w.empty(app)
		// The control: bound to it.
		n = w.counted(func() {
			w.must(deliver(w.take(stock, f.v6), f.outside, at(f.pod, 8080)))
			w.accept(app)
			w.refused("the tunnel's own port", func() error { return deliver(w.take(stock, f.v6), f.outside, at(f.pod, 15008)) })
		})
		if n["steer_delivery"] != 1 || n["strict_refused"] != 0 {
			w.t.Errorf("control: counted %v", n)
		}
		w.empty(w.listeners[f.hbone])
	})
}
