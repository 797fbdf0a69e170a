// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// listening is an acceptor on a loop of its own, with a Tunnel around it.
type listening struct {
	t              *testing.T
	a              *acceptor
	at             unix.Sockaddr
	accepted, full chan int
	log            strings.Builder // of the loop's thread
}

func newListening(t *testing.T) *listening {
	t.Helper()
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	s := &listening{t: t, accepted: make(chan int, 100), full: make(chan int, 100)}
	w := &worker{Worker: relay.NewWorker(l, nil)}
	w.t = &Tunnel{cfg: Config{Logger: slog.New(slog.NewTextHandler(&s.log, nil))}, top: math.MaxInt}
	w.spare.hold()
	done := make(chan struct{})
	go func() { defer close(done); l.Run() }()
	t.Cleanup(func() { l.Stop(); <-done; w.spare.release() })

	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 100)); err != nil {
		t.Fatal(err)
	}
	if s.at, err = unix.Getsockname(fd); err != nil {
		t.Fatal(err)
	}
	s.a = &acceptor{w: w, fd: fd, accepted: func(fd int) { unix.Close(fd); s.accepted <- fd }, full: func(fd int) { refuse(fd); s.full <- fd }}
	s.do(func() {
		if err := l.Register(fd, s.a); err != nil {
			t.Error(err)
		}
	})
	return s
}

// do runs f on the loop.
func (s *listening) do(f func()) {
	s.t.Helper()
	done := make(chan struct{})
	s.a.w.Loop.Post(func() { f(); close(done) })
	<-done
}

// client makes a socket, for later.
func (s *listening) client() int {
	s.t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	tv := unix.NsecToTimeval((10 * time.Second).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func (s *listening) connect(fd int) {
	s.t.Helper()
	if err := unix.Connect(fd, s.at); err != nil {
		s.t.Fatal(err)
	}
}

func (s *listening) wait(what string, c chan int) {
	s.t.Helper()
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		s.t.Fatalf("no connection was %s", what)
	}
}

// exhaust takes all descriptors that the process may have, until give.
func exhaust(t *testing.T) (give func()) {
	t.Helper()
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	few := before
	few.Cur = 256
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	var taken []int
	for {
		fd, err := unix.Dup(1)
		if err != nil {
			if !errors.Is(err, unix.EMFILE) {
				t.Error(err)
			}
			break
		}
		taken = append(taken, fd)
	}
	give = func() {
		for _, fd := range taken {
			unix.Close(fd)
		}
		taken = nil
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(give)
	return give
}

// Without descriptors connections are refused, each, and not left in the queue;
// with them again they are taken, without a new edge.
func TestAcceptWithoutDescriptors(t *testing.T) {
	s := newListening(t)
	var clients []int
	for range 5 {
		clients = append(clients, s.client())
	}
	give := exhaust(t)
	for _, fd := range clients[:3] {
		s.connect(fd)
	}
	for _, fd := range clients[:3] {
		s.wait("refused", s.full)
		if _, err := unix.Read(fd, make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("a client reads %v, want a reset", err)
		}
	}
	// Somebody else takes the one that is kept for this.
	s.do(func() { s.a.w.spare.release() })
	other, err := unix.Dup(1)
	if err != nil {
		t.Fatal(err)
	}
	s.connect(clients[3])
	s.do(func() {}) // it is looked at before
	unix.Close(other)
	give()
	select {
	case <-s.full:
	case <-s.accepted:
	case <-time.After(10 * time.Second):
		t.Fatal("a connection that came when there was none hangs")
	}
	s.connect(clients[4])
	s.wait("accepted", s.accepted)
	s.do(func() {
		if n := strings.Count(s.log.String(), "out of descriptors"); n != 1 {
			t.Errorf("the log says %d times that there are none", n)
		}
		if n := s.a.w.t.limits.descriptors.Load(); n < 3 {
			t.Errorf("%d were counted", n)
		}
	})
}

// The last ones are not given to connections.
func TestAcceptKeepsDescriptors(t *testing.T) {
	s := newListening(t)
	s.connect(s.client())
	s.wait("accepted", s.accepted)
	s.do(func() { s.a.w.t.top = 3 })
	s.connect(s.client())
	s.wait("refused", s.full)
}

// A turn takes so many, and leaves one above it to the next.
func TestAcceptShare(t *testing.T) {
	for _, n := range []int{acceptShare, acceptShare + 1} {
		s := newListening(t)
		taken := -1
		s.do(func() {
			for range n {
				s.connect(s.client())
			}
			s.a.Ready(loop.In)
			taken = len(s.accepted)
		})
		if taken != acceptShare {
			t.Errorf("a turn has taken %d of %d", taken, n)
		}
		for range n {
			s.wait("accepted", s.accepted)
		}
	}
}

// A listener that was closed while it rested takes nothing of who has its number.
func TestClosedAcceptorTakesNothing(t *testing.T) {
	s := newListening(t)
	s.do(s.a.close)
	s.do(func() { s.a.fd = -1; s.a.Ready(0) })
	if !s.a.closed || len(s.accepted) != 0 {
		t.Error("it goes on")
	}
	other := newListening(t)
	s.do(func() { s.a.fd = other.a.fd })
	fd := s.client()
	other.do(func() {
		other.connect(fd)
		s.a.Ready(0) // what the pause has put off
	})
	other.wait("accepted by the other", other.accepted)
	if len(s.accepted) != 0 {
		t.Error("it has taken another's connection")
	}
}
