// SPDX-License-Identifier: Apache-2.0

// Package loop is an event loop on one locked OS thread: readiness of
// descriptors (epoll, edge-triggered), work posted from other goroutines,
// timers, and a flush at the end of each turn.
//
// A descriptor that is registered belongs to the loop: from then on only the
// loop's own thread reads, writes or closes it, and Close is the only way to
// close it. That is what keeps one connection's bytes out of another that got
// the same number. Everything but Post, New and Stop is to be called on the
// loop's thread only.
//
// The package knows no protocol; tunnel/relay gives it its work.
package loop

import (
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Events says what a descriptor became ready for.
type Events uint32

// The events of epoll(7) that a Handler sees.
const (
	In    Events = unix.EPOLLIN
	Out   Events = unix.EPOLLOUT
	RDHup Events = unix.EPOLLRDHUP
	Hup   Events = unix.EPOLLHUP
	Err   Events = unix.EPOLLERR
	Pri   Events = unix.EPOLLPRI // an urgent byte, at which reads end though there is more

	// Ended is set in events that come with the end of the stream: after
	// them a short read does not mean that the socket is drained. Data
	// followed by a reset otherwise hangs for ever, since an edge that has
	// been seen is not reported again.
	Ended = RDHup | Hup | Err

	interest = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
)

// turnEvents is how many ready descriptors one turn takes from the kernel.
const turnEvents = 256

// postedShare is for how long a turn runs what was posted; the next one goes on. A
// crowd of results that arrive together, such as sockets that deliveries wait for,
// does not keep descriptors waiting for longer.
const postedShare = 250 * time.Microsecond

// Handler is what a descriptor is registered with.
type Handler interface {
	// Ready is called on the loop's thread with the events since the last
	// call. Level is not repeated: what is not read now is not announced
	// again (see Loop.Again).
	Ready(Events)
}

// Flusher has something to send at the end of a turn.
type Flusher interface {
	Flush()
}

type slot struct {
	h   Handler
	gen uint32 // distinguishes a descriptor number's successive owners
}

// Loop is one event loop. Create it with New and give it a goroutine with Run.
type Loop struct {
	ep, wake int
	slots    []slot
	open     int
	events   [turnEvents]unix.EpollEvent
	again    []Handler
	againRun []Handler
	flush    []Flusher
	timers   timers
	now      time.Time

	mu      sync.Mutex // guards posted, stopped, turns, thread and wake's life
	posted  []func()
	stopped bool
	turns   uint64
	thread  int // in which the loop runs; 0: in none

	running []func() // posted, being run
	ran     int      // of them
	owed    bool     // the last turn has left posted work, which nothing wakes for again
}

// New makes a loop. It holds two descriptors until Run has returned.
func New() (*Loop, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll descriptor: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(ep)
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	l := &Loop{ep: ep, wake: wake, now: time.Now()}
	if err := l.Register(wake, (*waker)(l)); err != nil {
		unix.Close(ep)
		unix.Close(wake)
		return nil, err
	}
	return l, nil
}

type waker Loop

// Ready drains the eventfd; Run runs what was posted.
func (w *waker) Ready(Events) {
	var b [8]byte
	_, _ = unix.Read(w.wake, b[:])
}

// Post runs f on the loop's thread soon. It may be called from anywhere, and
// reports false when the loop has stopped: f will then never run, and what it
// would have owned stays with the caller.
func (l *Loop) Post(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped {
		return false
	}
	l.posted = append(l.posted, f)
	if len(l.posted) == 1 {
		one := [8]byte{1}
		_, _ = unix.Write(l.wake, one[:])
	}
	return true
}

// Stop makes Run return after the current turn. Descriptors that are still
// registered are closed. It may be called from anywhere and more than once.
func (l *Loop) Stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped {
		return
	}
	l.stopped = true
	one := [8]byte{1}
	_, _ = unix.Write(l.wake, one[:])
}

// Register hands fd over to the loop. On an error the descriptor stays the
// caller's.
func (l *Loop) Register(fd int, h Handler) error {
	if fd < 0 {
		return fmt.Errorf("register descriptor %d: %w", fd, unix.EBADF)
	}
	for fd >= len(l.slots) {
		l.slots = append(l.slots, make([]slot, max(64, len(l.slots)))...)
	}
	s := &l.slots[fd]
	if s.h != nil {
		return fmt.Errorf("register descriptor %d: the loop owns it already", fd)
	}
	s.gen++
	ev := unix.EpollEvent{Events: interest, Fd: int32(fd), Pad: int32(s.gen)}
	if err := unix.EpollCtl(l.ep, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("register descriptor %d: %w", fd, err)
	}
	s.h = h
	l.open++
	return nil
}

// Close takes fd out of the loop and closes it.
func (l *Loop) Close(fd int) {
	if l.Release(fd) {
		unix.Close(fd)
	}
}

// Release takes fd out of the loop without closing it, and reports whether the
// loop owned it. The descriptor is the caller's again.
func (l *Loop) Release(fd int) bool {
	if fd < 0 || fd >= len(l.slots) || l.slots[fd].h == nil {
		return false
	}
	l.slots[fd].h = nil
	l.slots[fd].gen++
	l.open--
	// The description may be shared (a dup, a hand-over), and then closing
	// our number would leave it in the epoll set.
	_ = unix.EpollCtl(l.ep, unix.EPOLL_CTL_DEL, fd, nil)
	return true
}

// Registered is the number of descriptors that the loop owns, its own aside.
func (l *Loop) Registered() int { return l.open - 1 }

// Again calls h.Ready(0) in the next turn, which then does not wait: for a
// handler that has used up its share of this turn.
func (l *Loop) Again(h Handler) { l.again = append(l.again, h) }

// AtFlush calls f.Flush once at the end of this turn, or of the next one when
// flushing has begun; that one then does not wait. The caller sees to it that
// it asks once only.
func (l *Loop) AtFlush(f Flusher) { l.flush = append(l.flush, f) }

// Now is the time at the beginning of this turn.
func (l *Loop) Now() time.Time { return l.now }

// Run turns the loop until Stop, on a locked OS thread.
func (l *Loop) Run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer l.close()
	shortSlice()
	l.mu.Lock()
	l.thread = unix.Gettid()
	l.mu.Unlock()
	for l.turn() {
	}
}

// slice is the time slice that a loop's thread asks for. Its turns are short,
// and what it has to do is waited for: with a shorter slice than others it runs
// soon after it is woken, and gets no more time than they do.
const slice = 200 * time.Microsecond

// shortSlice asks for the slice, for the calling thread. The kernel knows such
// requests since 6.12 (sched_attr's sched_runtime under SCHED_OTHER); an older
// one takes the call and ignores it.
func shortSlice() {
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil || attr.Policy != unix.SCHED_NORMAL {
		return
	}
	attr.Runtime = uint64(slice)
	_ = unix.SchedSetAttr(0, attr, 0)
}

func (l *Loop) turn() bool {
	n := l.wait()
	l.now = time.Now()
	l.runPosted()
	for i := range l.events[:n] {
		ev := &l.events[i]
		if s := &l.slots[ev.Fd]; s.h != nil && s.gen == uint32(ev.Pad) {
			s.h.Ready(Events(ev.Events))
		}
	}
	if len(l.again) > 0 {
		l.again, l.againRun = l.againRun[:0], l.again
		for i, h := range l.againRun {
			l.againRun[i] = nil
			h.Ready(0)
		}
	}
	l.timers.run(l.now)
	// What asks again while it is flushed, or is asked for by another's flush,
	// has its turn next time.
	n = len(l.flush)
	for i := range n {
		l.flush[i].Flush()
	}
	rest := copy(l.flush, l.flush[n:])
	clear(l.flush[rest:])
	l.flush = l.flush[:rest]
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turns++
	l.owed = l.ran < len(l.running) || len(l.posted) > 0
	return !l.stopped
}

// Work is how many turns the loop has made and how much CPU time it has used. It
// may be called from anywhere; of a loop that does not run the time is 0.
func (l *Loop) Work() (turns uint64, cpu time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.thread == 0 {
		return l.turns, 0
	}
	// The clock of another thread, as pthread_getcpuclockid(3) makes it: MAKE_THREAD_CPUCLOCK
	// in the kernel's include/linux/posix-timers.h, of CPUCLOCK_SCHED. The loop
	// itself has nothing to do for it.
	const perThread, scheduled = 4, 2
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^l.thread<<3|perThread|scheduled), &t); err != nil {
		return l.turns, 0
	}
	return l.turns, time.Duration(t.Nano())
}

// runPosted runs what was posted, in its order, for its share of the turn.
func (l *Loop) runPosted() {
	if l.ran == len(l.running) {
		l.mu.Lock()
		l.posted, l.running, l.ran = l.running[:0], l.posted, 0
		l.mu.Unlock()
	}
	for l.ran < len(l.running) {
		f := l.running[l.ran]
		l.running[l.ran] = nil
		l.ran++
		f()
		if time.Since(l.now) >= postedShare {
			return
		}
	}
}

// wait first asks without the scheduler's knowledge (a raw call that returns
// at once costs a third of one that may block), and blocks only when there is
// nothing to do.
func (l *Loop) wait() int {
	n, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.ep), uintptr(unsafe.Pointer(&l.events[0])), turnEvents, 0, 0, 0)
	if e == 0 && n > 0 {
		return int(n)
	}
	if len(l.again) > 0 || len(l.flush) > 0 || l.owed {
		return 0
	}
	timeout := -1
	if at, ok := l.timers.next(); ok {
		d := time.Until(at)
		if d <= 0 {
			return 0
		}
		timeout = int((d + time.Millisecond - 1) / time.Millisecond)
	}
	k, err := unix.EpollWait(l.ep, l.events[:], timeout)
	if err != nil {
		return 0 // EINTR
	}
	return k
}

func (l *Loop) close() {
	for l.ran < len(l.running) || len(l.posted) > 0 { // what was accepted before Stop owns descriptors
		l.runPosted()
	}
	for fd := range l.slots {
		if l.slots[fd].h != nil && fd != l.wake {
			l.slots[fd].h = nil
			unix.Close(fd)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.thread = 0
	unix.Close(l.wake)
	unix.Close(l.ep)
}
