// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/redirect"
)

// What the tunnel dials leaves as it is, also to what is a destination.
func TestDialsLeave(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{outside4: redirect.DestinationHBONE, outside6: redirect.DestinationHBONE}))
	for _, tt := range []struct{ src, dst netip.Addr }{{pod4, outside4}, {pod6, outside6}} {
		l := w.listen(w.outside, at(tt.dst, 15008))
		n := w.counted(func() {
			fd, err := w.maker.Dial(w.pod, tt.src)
			w.must(err)
			w.closing(fd)
			if err := unix.Connect(fd, sockaddr(at(tt.dst, 15008))); !errors.Is(err, unix.EINPROGRESS) {
				w.must(err)
			}
			c := w.accept(l)
			if got := peer(c); got.Addr() != tt.src || got.Port() < 10240 || got.Port() > 32767 {
				t.Errorf("the peer sees %s, want %s and a port of 10240-32767", got, tt.src)
			}
			w.must(limit(fd))
			w.exchange(fd, c)
		})
		if n["connect_own_socket"] != 1 || n["connect_carried"] != 0 {
			t.Errorf("counted %v", n)
		}
	}
}

// The tunnel's mark is inherited by what its listeners accept, and a pod cannot
// set it.
func TestAcceptedSocketsAreTheTunnels(t *testing.T) {
	w := newWorld(t)
	w.start()
	fd, err := w.connect(w.pod, at(remote4, 8080), nil)
	w.must(err)
	c := w.accept(w.listeners[redirect.Outbound4])
	reconnect := func(fd int) map[string]uint64 {
		return w.counted(func() {
			w.in(w.pod, func() error {
				if err := disconnect(fd, &unix.RawSockaddrInet4{Family: unix.AF_UNSPEC}); err != nil {
					return err
				}
				_ = unix.SetNonblock(fd, true)
				if err := unix.Connect(fd, sockaddr(at(remote4, 9090))); err != nil && !errors.Is(err, unix.EINPROGRESS) {
					return err
				}
				return nil
			})
		})
	}
	if n := reconnect(c); n["connect_own_socket"] != 1 {
		t.Errorf("accepted: counted %v", n)
	}
	if n := reconnect(fd); n["connect_carried"] != 1 {
		t.Errorf("the application's: counted %v", n)
	}
}
