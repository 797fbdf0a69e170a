// SPDX-License-Identifier: Apache-2.0

package socket

import (
	"errors"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/internal/testns"
)

var (
	client4 = netip.MustParseAddr("10.98.0.7")
	client6 = netip.MustParseAddr("fd98::7")
)

func maker(t *testing.T, own func(int) error) *Maker {
	t.Helper()
	m, err := New(own)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// owned collects what was marked as the tunnel's.
type owned struct {
	mu  sync.Mutex
	fds map[int]int
}

func (o *owned) own(fd int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fds == nil {
		o.fds = map[int]int{}
	}
	o.fds[fd]++
	return nil
}

func option(t *testing.T, fd, level, name int) int {
	t.Helper()
	v, err := unix.GetsockoptInt(fd, level, name)
	if err != nil {
		t.Fatalf("option %d of level %d: %v", name, level, err)
	}
	return v
}

func lingers(t *testing.T, fd int) bool {
	t.Helper()
	l, err := unix.GetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER)
	if err != nil {
		t.Fatal(err)
	}
	return l.Onoff == 1 && l.Linger == 0
}

// common is what holds for all: in the namespace, plain TCP, non-blocking, and
// marked as the tunnel's.
func common(t *testing.T, o *owned, ns *netns.NS, fd int) {
	t.Helper()
	o.mu.Lock()
	if o.fds[fd] == 0 {
		t.Error("it is not marked as the tunnel's")
	}
	o.mu.Unlock()
	if c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil || c != ns.Cookie() {
		t.Errorf("namespace %d, %v, want %d", c, err, ns.Cookie())
	}
	if p := option(t, fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); p != unix.IPPROTO_TCP {
		t.Errorf("protocol %d", p)
	}
	if option(t, fd, unix.IPPROTO_TCP, unix.TCP_NODELAY) == 0 {
		t.Error("it delays")
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("it blocks: %v", err)
	}
	if flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("it is inherited by processes: %v", err)
	}
}

func TestListen(t *testing.T) {
	ns := testns.New(t)
	var o owned
	m := maker(t, o.own)
	for _, tt := range []struct {
		at     string
		linger bool
	}{{"0.0.0.0:15001", true}, {"[::]:15001", true}, {"0.0.0.0:15008", false}, {"[::]:15008", false}} {
		fd, err := m.Listen(ns, netip.MustParseAddrPort(tt.at), true)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		common(t, &o, ns, fd)
		if got := lingers(t, fd); got != tt.linger {
			t.Errorf("%s resets on close: %v, want %v", tt.at, got, tt.linger)
		}
		if option(t, fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN) == 0 {
			t.Errorf("%s does not listen", tt.at)
		}
		if tt.at[0] == '[' {
			if option(t, fd, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT) == 0 || option(t, fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY) == 0 {
				t.Errorf("%s: not transparent, or of both families", tt.at)
			}
		} else if option(t, fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT) == 0 {
			t.Errorf("%s: not transparent", tt.at)
		}
	}
	if _, err := m.Listen(ns, netip.MustParseAddrPort("0.0.0.0:15001"), true); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second listener: %v", err)
	}
}

// A socket that cannot be marked as the tunnel's must not be used: its
// connections would be carried by themselves.
func TestSocketThatCannotBeMarkedIsClosed(t *testing.T) {
	ns := testns.New(t)
	want := errors.New("no")
	var last atomic.Int64
	m := maker(t, func(fd int) error { last.Store(int64(fd)); return want })
	if fd, err := m.Dial(ns, netip.MustParseAddr("127.0.0.1")); !errors.Is(err, want) || fd != -1 {
		t.Errorf("dial: %d, %v", fd, err)
	}
	if _, err := unix.FcntlInt(uintptr(last.Load()), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("the descriptor is still open: %v", err)
	}
	s := m.Stock(ns)
	defer s.Close()
	got := make(chan error, 1)
	s.Wait(false, func(fd int, err error) { got <- err })
	if err := <-got; !errors.Is(err, want) {
		t.Errorf("wait: %v", err)
	}
}

func wait(t *testing.T, s *Stock, v6 bool) int {
	t.Helper()
	type made struct {
		fd  int
		err error
	}
	got := make(chan made, 1)
	s.Wait(v6, func(fd int, err error) { got <- made{fd, err} })
	m := <-got
	if m.err != nil {
		t.Fatal(m.err)
	}
	return m.fd
}

func TestStockGrowsWithUse(t *testing.T) {
	ns := testns.New(t)
	var o owned
	m := maker(t, o.own)
	s := m.Stock(ns)
	for _, v6 := range []bool{false, true} {
		if fd, ok := s.Take(v6); ok {
			t.Errorf("a new stock had %d", fd)
		}
		deadline := time.Now().Add(5 * time.Second)
		for taken := 0; taken < 20; {
			fd, ok := s.Take(v6)
			if !ok {
				if time.Now().After(deadline) {
					t.Fatalf("after %d the stock was not filled", taken)
				}
				fd = wait(t, s, v6)
			}
			common(t, &o, ns, fd)
			if option(t, fd, unix.SOL_SOCKET, unix.SO_MARK) != carriedMark || option(t, fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX) != 1 || !lingers(t, fd) {
				t.Error("it is no delivery socket")
			}
			unix.Close(fd)
			taken++
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if m.stocked.used != 0 {
		t.Errorf("%d sockets are still counted", m.stocked.used)
	}
	got := make(chan error, 1)
	s.Wait(false, func(_ int, err error) { got <- err })
	if err := <-got; !errors.Is(err, ErrClosed) {
		t.Errorf("wait after close: %v", err)
	}
	if _, ok := s.Take(false); ok {
		t.Error("taken after close")
	}
}

// stocked is how many there are, and how many there are to be.
func (s *Stock) stocked(v6 bool) (n, target int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &s.families[index(v6)]
	return len(f.fds), f.target
}

// What a burst has left in stock goes when nobody takes of it, and all pods
// together hold no more than the node may.
func TestStockIsBounded(t *testing.T) {
	ns := testns.New(t)
	m := maker(t, func(int) error { return nil })
	const node = maxStock + maxStock/2 // room for one and a half
	m.stocked.limit = node
	used := func() int {
		m.stocked.mu.Lock()
		defer m.stocked.mu.Unlock()
		return m.stocked.used
	}
	stocks := []*Stock{m.Stock(ns), m.Stock(ns), m.Stock(ns)}
	for _, s := range stocks {
		for _, v6 := range []bool{false, true} {
			// As a burst does: all that there is, again and again.
			full := 0
			for deadline := time.Now().Add(10 * time.Second); full < 2; {
				for {
					fd, ok := s.Take(v6)
					if !ok {
						break
					}
					unix.Close(fd)
				}
				unix.Close(wait(t, s, v6))
				n, target := s.stocked(v6)
				for ; n < target && time.Now().Before(deadline); n, target = s.stocked(v6) {
					time.Sleep(time.Millisecond) // it is being filled
				}
				all := used()
				if n > maxStock || target > maxStock || all > node {
					t.Fatalf("%d sockets in one stock, to be %d, at most %d; %d in all, at most %d", n, target, maxStock, all, node)
				}
				if n == maxStock || all == node {
					full++
				}
				if time.Now().After(deadline) {
					t.Fatalf("a burst has brought the stock to %d, and the node's to %d", n, all)
				}
			}
		}
	}
	if used() != node { // the control
		t.Errorf("under load %d sockets are in stock, want %d", used(), node)
	}
	// Those beyond the bound get theirs too, made for them.
	for _, s := range stocks {
		unix.Close(wait(t, s, false))
	}
	// Idle: the first time finds that the stock was used, each other halves it.
	for deadline := time.Now().Add(10 * time.Second); used() > 0 && time.Now().Before(deadline); {
		for _, s := range stocks {
			s.shrink()
		}
	}
	for i, s := range stocks {
		n4, _ := s.stocked(false)
		n6, _ := s.stocked(true)
		if n4+n6 != 0 {
			t.Errorf("stock %d has %d sockets when idle", i, n4+n6)
		}
	}
	if used() != 0 {
		t.Errorf("%d sockets are counted when idle", used())
	}
	for _, s := range stocks {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Each one that waits is answered once, whatever is closed meanwhile.
func TestEveryWaiterIsAnswered(t *testing.T) {
	ns := testns.New(t)
	m := maker(t, func(int) error { return nil })
	s := m.Stock(ns)
	const n = 200
	var open sync.WaitGroup
	answers := make(chan int, 2*n)
	for i := range n {
		open.Add(1)
		go func() {
			defer open.Done()
			s.Wait(i%2 == 0, func(fd int, err error) {
				if (err == nil) != (fd >= 0) {
					t.Errorf("%d, %v", fd, err)
				}
				if err == nil {
					unix.Close(fd)
				}
				answers <- fd
			})
			if i == n/2 {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	open.Wait()
	for range n {
		select {
		case <-answers:
		case <-time.After(5 * time.Second):
			t.Fatal("somebody waits for ever")
		}
	}
}

// A deleted pod's namespace must not be kept by the thread.
func TestThreadLeavesTheNamespace(t *testing.T) {
	ns := testns.New(t)
	m := maker(t, func(int) error { return nil })
	s := m.Stock(ns)
	unix.Close(wait(t, s, false))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.in(nil, func() error {
		here, err := netns.Current()
		if err != nil {
			return err
		}
		defer here.Close()
		if here.Cookie() == ns.Cookie() {
			t.Error("the thread is still in the namespace")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// Live connections of one client to one destination never share a port, and the
// ports leave room for applications' listeners.
func TestPortsAreNotShared(t *testing.T) {
	ns := testns.New(t)
	m := maker(t, func(int) error { return nil })
	seen := map[int]bool{}
	for range 300 {
		fd, err := m.Dial(ns, netip.MustParseAddr("127.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		sa, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		port := sa.(*unix.SockaddrInet4).Port
		if port < firstPort || port > lastPort || seen[port] {
			t.Fatalf("port %d, a second time: %v", port, seen[port])
		}
		seen[port] = true
	}
	for port := range seen {
		err := ns.Do(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
				return err
			}
			return errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Port: port}), unix.Listen(fd, 1))
		})
		if err != nil {
			t.Fatalf("an application cannot listen on %d: %v", port, err)
		}
		break
	}
}

func TestDeliverRefusesTwoFamilies(t *testing.T) {
	ns := testns.New(t)
	s := maker(t, func(int) error { return nil }).Stock(ns)
	defer s.Close()
	fd := wait(t, s, true)
	defer unix.Close(fd)
	if err := Deliver(fd, client6, netip.AddrPortFrom(client4, 80), nil); !errors.Is(err, unix.EAFNOSUPPORT) {
		t.Errorf("deliver: %v", err)
	}
}

func TestCloseEndsTheMaker(t *testing.T) {
	ns := testns.New(t)
	m, err := New(func(int) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	s := m.Stock(ns)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Dial(ns, netip.MustParseAddr("127.0.0.1")); !errors.Is(err, ErrClosed) {
		t.Errorf("dial: %v", err)
	}
	got := make(chan error, 1)
	s.Wait(false, func(_ int, err error) { got <- err })
	if err := <-got; !errors.Is(err, ErrClosed) {
		t.Errorf("wait: %v", err)
	}
	if err := errors.Join(s.Close(), m.Close()); err != nil {
		t.Error(err)
	}
}

// BenchmarkDeliverySocket is what a connection costs that finds the stock empty.
func BenchmarkDeliverySocket(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Fatal("run it as root")
	}
	ns, err := netns.Current()
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	m, err := New(func(int) error { return nil })
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	for b.Loop() {
		err := m.in(ns, func() error {
			fd, err := m.delivery(false)
			if err == nil {
				unix.Close(fd)
			}
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}
