// SPDX-License-Identifier: Apache-2.0

package loop_test

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/loop"
)

func start(t *testing.T) *loop.Loop {
	t.Helper()
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(l.Run)
	t.Cleanup(func() { l.Stop(); running.Wait() })
	return l
}

// on runs f on the loop's thread and waits for it.
func on(l *loop.Loop, f func()) {
	done := make(chan struct{})
	l.Post(func() { defer close(done); f() })
	<-done
}

func pair(t *testing.T) (int, int) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return p[0], p[1]
}

type handler func(loop.Events)

func (h handler) Ready(e loop.Events) { h(e) }

type flusher func()

func (f flusher) Flush() { f() }

func receive[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(10 * time.Second):
		t.Fatalf("nothing came: %s", what)
		panic("unreachable")
	}
}

func TestReadyReportsDataAndEnd(t *testing.T) {
	l := start(t)
	a, b := pair(t)
	events := make(chan loop.Events, 16)
	on(l, func() {
		if err := l.Register(a, handler(func(e loop.Events) { events <- e })); err != nil {
			t.Error(err)
		}
	})
	receive(t, events, "first writability")
	if _, err := unix.Write(b, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if e := receive(t, events, "data"); e&loop.In == 0 {
		t.Fatalf("events %x lack In", e)
	}
	unix.Close(b)
	if e := receive(t, events, "end"); e&loop.Ended == 0 {
		t.Fatalf("events %x lack the end", e)
	}
	on(l, func() { l.Close(a) })
}

func TestRegisterTwiceIsRefused(t *testing.T) {
	l := start(t)
	a, b := pair(t)
	defer unix.Close(b)
	on(l, func() {
		if err := l.Register(a, handler(func(loop.Events) {})); err != nil {
			t.Error(err)
		}
		if err := l.Register(a, handler(func(loop.Events) {})); err == nil {
			t.Error("a descriptor was registered twice")
		}
		if n := l.Registered(); n != 1 {
			t.Errorf("%d descriptors registered, want 1", n)
		}
		l.Close(a)
		if n := l.Registered(); n != 0 {
			t.Errorf("%d descriptors registered after Close, want 0", n)
		}
	})
}

func TestRegisterRefusesWhatIsNoDescriptor(t *testing.T) {
	l := start(t)
	on(l, func() {
		if err := l.Register(-1, handler(func(loop.Events) {})); err == nil {
			t.Error("a negative descriptor was registered")
		}
	})
}

func TestReleaseGivesTheDescriptorBack(t *testing.T) {
	l := start(t)
	a, b := pair(t)
	defer unix.Close(a)
	defer unix.Close(b)
	var calls atomic.Int32
	first := make(chan struct{}, 16)
	on(l, func() { _ = l.Register(a, handler(func(loop.Events) { calls.Add(1); first <- struct{}{} })) })
	receive(t, first, "writability")
	on(l, func() {
		if !l.Release(a) {
			t.Error("Release did not know the descriptor")
		}
		if l.Release(a) {
			t.Error("Release gave a descriptor back twice")
		}
	})
	n := calls.Load()
	_, _ = unix.Write(b, []byte("x"))
	on(l, func() {})
	on(l, func() {})
	if calls.Load() != n {
		t.Fatal("a released descriptor's handler was called")
	}
	if _, err := unix.Write(a, []byte("x")); err != nil {
		t.Fatalf("write to a released descriptor: %v", err)
	}
}

func TestFlushOncePerTurn(t *testing.T) {
	l := start(t)
	turns := make(chan int, 3)
	n := 0
	var f flusher
	f = func() {
		n++
		turns <- n
		if n < 3 {
			l.AtFlush(f) // has its turn next time, and that one does not wait
		}
	}
	l.Post(func() { l.AtFlush(f) })
	for want := 1; want <= 3; want++ {
		if got := receive(t, turns, "flush"); got != want {
			t.Fatalf("flush %d, want %d", got, want)
		}
	}
}

func TestAgainDoesNotWait(t *testing.T) {
	l := start(t)
	calls := make(chan int, 5)
	n := 0
	var h handler
	h = func(loop.Events) {
		n++
		calls <- n
		if n < 5 {
			l.Again(h)
		}
	}
	l.Post(func() { l.Again(h) })
	for range 5 {
		receive(t, calls, "turn")
	}
}

func TestTimersFireInOrderAndStop(t *testing.T) {
	l := start(t)
	fired := make(chan int, 4)
	on(l, func() {
		l.After(20*time.Millisecond, func() { fired <- 2 })
		l.After(time.Millisecond, func() { fired <- 1 })
		stopped := l.After(5*time.Millisecond, func() { fired <- 99 })
		stopped.Stop()
		stopped.Stop()
		var none *loop.Timer
		none.Stop()
	})
	for want := 1; want <= 2; want++ {
		if got := receive(t, fired, "timer"); got != want {
			t.Fatalf("timer %d fired, want %d", got, want)
		}
	}
}

// A loop's turns are counted, and the time that its thread has used, which is
// nobody else's.
func TestWork(t *testing.T) {
	busy, idle := start(t), start(t)
	on(idle, func() {})
	turns, cpu := busy.Work()
	_, rest := idle.Work()
	const spin = 30 * time.Millisecond
	on(busy, func() {
		var before, now unix.Timespec
		_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before)
		for now = before; now.Nano()-before.Nano() < spin.Nanoseconds(); {
			_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now)
		}
	})
	on(busy, func() {}) // the turn before is over by then
	moreTurns, more := busy.Work()
	if moreTurns <= turns {
		t.Errorf("%d turns, %d before", moreTurns, turns)
	}
	if more-cpu < spin {
		t.Errorf("%v were used, want %v or more", more-cpu, spin)
	}
	if _, now := idle.Work(); now-rest > spin/2 { // the control
		t.Errorf("another loop used %v meanwhile", now-rest)
	}
}

func TestPostAfterStopIsRefused(t *testing.T) {
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(l.Run)
	l.Stop()
	running.Wait()
	if l.Post(func() { t.Error("ran after Stop") }) {
		t.Fatal("Post took work that will never run")
	}
	l.Stop()
}

// What was posted does not keep descriptors waiting for longer than its share of a
// turn, is run in its order, and all of it, also when the loop is stopped.
func TestPostedWorkHasAShareOfATurn(t *testing.T) {
	l := start(t)
	a, b := pair(t)
	defer unix.Close(b)
	const many = 20
	var ran []int
	ready, all := make(chan int, 1), make(chan struct{})
	on(l, func() {
		if err := l.Register(a, handler(func(e loop.Events) {
			if e&loop.In != 0 {
				ready <- len(ran)
			}
		})); err != nil {
			t.Error(err)
		}
	})
	work := func(i int) func() {
		return func() {
			for begun := time.Now(); time.Since(begun) < loop.PostedShare/4; {
			}
			if ran = append(ran, i); i == many-1 {
				close(all)
			}
		}
	}
	held, release := make(chan struct{}), make(chan struct{})
	l.Post(func() { close(held); <-release })
	<-held
	for i := range many {
		l.Post(work(i))
	}
	if _, err := unix.Write(b, []byte("x")); err != nil {
		t.Fatal(err)
	}
	close(release)
	if n := receive(t, ready, "data beside posted work"); n > 5 {
		t.Errorf("%d of %d pieces of a quarter of the share were run before a descriptor that was ready", n, many)
	}
	receive(t, all, "the end of posted work")
	for i, n := range ran {
		if i != n {
			t.Fatalf("run in the order %v", ran)
		}
	}
	// What is left when the loop is stopped is run yet: it may own descriptors.
	ran, all = nil, make(chan struct{})
	held, release = make(chan struct{}), make(chan struct{})
	l.Post(func() { close(held); <-release })
	<-held
	for i := range many {
		l.Post(work(i))
	}
	l.Stop()
	close(release)
	receive(t, all, "the end of posted work after Stop")
}

// What is posted while a turn has not ended with what was posted before it is not
// forgotten: its wake-up is gone with the turn that ends with that.
func TestPostedBesideALeftoverIsRun(t *testing.T) {
	l := start(t)
	all := make(chan struct{})
	held, release := make(chan struct{}), make(chan struct{})
	l.Post(func() { close(held); <-release })
	<-held
	l.Post(func() {
		l.Post(func() { close(all) })
		for begun := time.Now(); time.Since(begun) < 2*loop.PostedShare; {
		}
	})
	l.Post(func() {})
	close(release)
	receive(t, all, "what was posted beside a leftover")
}

// The descriptors of connections are closed and made anew as fast as it goes
// on several loops while others write: were a closed one used once more, its
// bytes would come out of a connection with another tag.
func TestCloseAgainstWriteNeverReachesAReusedDescriptor(t *testing.T) {
	for _, n := range []int{2, 4} {
		loops := make([]*loop.Loop, n)
		for i := range loops {
			loops[i] = start(t)
		}
		wrong, clean := churn(loops, 2000/n)
		if wrong != 0 {
			t.Errorf("%d loops: %d messages came out of a foreign connection", n, wrong)
		}
		if clean == 0 {
			t.Errorf("%d loops: no message came through at all", n)
		}
	}
}

// The control: a writer that keeps a raw number past its close is noticed by
// the same oracle.
func TestReuseDetectorRings(t *testing.T) {
	a, b := pair(t)
	stale := a
	unix.Close(a)
	c, d := pair(t) // takes the number
	defer unix.Close(b)
	defer unix.Close(c)
	defer unix.Close(d)
	if c != stale {
		t.Fatalf("the kernel gave %d, not %d: run again", c, stale)
	}
	var msg [8]byte
	binary.LittleEndian.PutUint64(msg[:], 1)
	_, _ = unix.Write(stale, msg[:])
	if tag, ok := readTag(d); !ok || tag == 2 {
		t.Fatal("the oracle did not see a write to a reused descriptor")
	}
}

func readTag(fd int) (uint64, bool) {
	var b [8]byte
	n, err := unix.Read(fd, b[:])
	return binary.LittleEndian.Uint64(b[:]), err == nil && n == 8
}

// echo writes its tag whenever it is ready, until it is closed by a timer or a
// posted call that may come at any time.
type echo struct {
	l    *loop.Loop
	fd   int
	tag  uint64
	open bool
}

func (e *echo) Ready(loop.Events) { e.write() }

func (e *echo) write() {
	if !e.open {
		return
	}
	var msg [8]byte
	binary.LittleEndian.PutUint64(msg[:], e.tag)
	iov := [1]unix.Iovec{{Base: &msg[0], Len: 8}}
	_, _ = loop.Send(e.fd, iov[:])
}

func churn(loops []*loop.Loop, rounds int) (wrong, clean int) {
	var bad, good atomic.Int64
	var all sync.WaitGroup
	var tags atomic.Uint64
	for _, l := range loops {
		all.Go(func() {
			for range rounds {
				p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					continue
				}
				e := &echo{l: l, fd: p[0], tag: tags.Add(1), open: true}
				closed := make(chan struct{})
				l.Post(func() {
					if l.Register(e.fd, e) != nil {
						unix.Close(e.fd)
						close(closed)
						return
					}
					for range 4 {
						l.Again(e)
					}
					l.Post(func() { e.open = false; l.Close(e.fd); close(closed) })
					l.Post(e.write) // comes after the close
				})
				<-closed
				for {
					tag, ok := readTag(p[1])
					if !ok {
						break
					}
					if tag == e.tag {
						good.Add(1)
					} else {
						bad.Add(1)
					}
				}
				unix.Close(p[1])
			}
		})
	}
	all.Wait()
	return int(bad.Load()), int(good.Load())
}

func TestAdvance(t *testing.T) {
	a, b := []byte("hello"), []byte("world")
	for n := 0; n <= 10; n++ {
		iov := []unix.Iovec{{Base: &a[0], Len: 5}, {Base: &b[0], Len: 5}}
		rest := loop.Advance(iov, n)
		var got []byte
		for i := range rest {
			got = append(got, unsafe.Slice(rest[i].Base, rest[i].Len)...)
		}
		if want := "helloworld"[n:]; string(got) != want {
			t.Errorf("Advance %d leaves %q, want %q", n, got, want)
		}
	}
}
