// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/tunnel/h2"
)

// An advertised window cannot be taken back, so what peers have queued is
// bounded by ending what holds the most and moves the least. Half of a Budget is
// for what is queued, half for what peers hold open.
const (
	// DefaultMemory is a Budget's size where nothing else is said.
	DefaultMemory = 256 << 20 // bytes

	// peerPart is one peer's part of each half: a quarter, so that no three
	// can lock the others out.
	peerPart = 4

	// floorPart is what a peer may hold open though others have used all up,
	// as a part of its half: 2 MiB of the default, or 1,024 streams.
	floorPart = 64

	// tightPart is from which part of its half used on windows neither start
	// nor grow beyond startWindow.
	tightPart = 2

	// relief is down to which eighths of a limit queues are reset, so that the
	// next byte does not ask for it again.
	relief = 7

	// hoardTime is how long an application that takes nothing is spared while
	// there are others that have taken nothing for longer.
	hoardTime = time.Second

	// pokeEvery is how often the other loops are asked to look at their queues.
	pokeEvery = 10 * time.Millisecond

	// SessionCost and StreamCost are what a peer is charged for a session and a
	// stream that it holds open, in bytes. A session with the peer's
	// certificates was seen to take 20 KiB, a stream with its relay 1 to 2 KiB.
	SessionCost = 32 << 10
	StreamCost  = 2 << 10
)

// Budget bounds the memory that peers can make a node use. It may be used from
// any goroutine.
type Budget struct {
	half   int64 // bytes, of each kind
	queued atomic.Int64
	open   atomic.Int64

	shed  func(Shed) // told on a loop's thread; may be nil
	poked atomic.Int64

	mu      sync.Mutex // guards workers
	workers []*Worker
}

// Shed is what was reset at once to keep a budget.
type Shed struct {
	Streams int
	Bytes   int  // of memory that they held
	Peer    bool // for a peer's part; else for the node's
}

// NewBudget makes a budget of some bytes; 0: DefaultMemory. shed is told of each
// relief, on the thread of the loop that gave it; nil: nobody is.
func NewBudget(size int64, shed func(Shed)) *Budget {
	if size <= 0 {
		size = DefaultMemory
	}
	return &Budget{half: size / 2, shed: shed}
}

// Queued is how many bytes are held for applications that do not take them.
func (b *Budget) Queued() int64 { return b.queued.Load() }

// Open is what sessions and streams of peers are charged at, in bytes.
func (b *Budget) Open() int64 { return b.open.Load() }

// Size is the budget in bytes.
func (b *Budget) Size() int64 { return 2 * b.half }

func (b *Budget) over() bool  { return b.queued.Load() > b.half }
func (b *Budget) tight() bool { return b.queued.Load() > b.half/tightPart }

// Account is one peer's use of a budget, over all of its sessions.
type Account struct {
	b      *Budget
	queued atomic.Int64
	open   atomic.Int64
}

// Account makes a peer's account.
func (b *Budget) Account() *Account { return &Account{b: b} }

// Open charges n bytes for something that the peer wants to hold open, and
// reports whether it may. Close gives them back.
func (a *Account) Open(n int64) bool {
	mine, all := a.open.Add(n), a.b.open.Add(n)
	if mine > a.b.half/peerPart || all > a.b.half && mine > a.b.half/floorPart {
		a.Close(n)
		return false
	}
	return true
}

// Close gives n bytes back that Open charged.
func (a *Account) Close(n int64) {
	a.open.Add(-n)
	a.b.open.Add(-n)
}

func (a *Account) over() bool { return a.queued.Load() > a.b.half/peerPart }
func (a *Account) tight() bool {
	return a.queued.Load() > a.b.half/peerPart/tightPart || a.b.tight()
}

// meter is told by a trunk's connection what its queues hold.
func (t *Trunk) meter(n int) {
	t.w.queued += int64(n)
	t.peer.queued.Add(int64(n))
	t.peer.b.queued.Add(int64(n))
}

// relieve brings the queues below their bounds again after p's have grown.
func (w *Worker) relieve(p *Account) {
	if p.over() {
		limit := p.b.half / peerPart
		w.reset(true, func(t *Trunk) bool { return t.peer == p }, func() bool { return p.queued.Load() <= limit/8*relief })
	}
	if b := w.budget; b.over() {
		w.share()
		if b.over() {
			b.poke(w)
		}
	}
}

// share resets what this loop has beyond its share, while the node is over.
func (w *Worker) share() {
	b := w.budget
	if !b.over() {
		return
	}
	share := b.half / int64(max(1, len(b.workers)))
	w.reset(false, func(*Trunk) bool { return true }, func() bool {
		return b.queued.Load() <= b.half/8*relief || w.queued <= share/8*relief
	})
}

// poke has the other loops look at theirs: those that are idle would not notice.
func (b *Budget) poke(w *Worker) {
	now, was := w.Loop.Now().UnixNano(), b.poked.Load()
	if now-was < int64(pokeEvery) || !b.poked.CompareAndSwap(was, now) {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range b.workers {
		if o != w {
			o.Loop.Post(o.share)
		}
	}
}

// hoard is a stream with bytes that its application does not take.
type hoard struct {
	t      *Trunk
	st     *h2.Stream
	r      *Relay // nil: its application is still being reached, which takes no longer than tunnel.connectTimeout
	memory int
	idle   bool // for longer than hoardTime
}

// hoardDetail is of EndHoard.
const hoardDetail = "its application takes nothing, and the memory for what peers send is used up"

// hoarded is the user of a stream that was reset before it had a relay.
type hoarded struct{}

// Hoarded says of a stream that has no relay yet whether the budget has ended it,
// with the detail that EndHoard has.
func Hoarded(st *h2.Stream) (detail string, yes bool) {
	_, yes = st.User.(hoarded)
	return hoardDetail, yes
}

// reset ends streams until enough is said: those whose applications have taken
// nothing for a while first, and of these the largest.
func (w *Worker) reset(peer bool, of func(*Trunk) bool, enough func() bool) {
	now := w.Loop.Now()
	var all []hoard
	for t := range w.trunks {
		if !of(t) {
			continue
		}
		t.s.H2.Hoards(func(st *h2.Stream) {
			h := hoard{t: t, st: st, memory: st.QueueMemory()}
			if h.r, _ = st.User.(*Relay); h.r != nil {
				h.idle = now.Sub(h.r.stuck) >= hoardTime
			}
			all = append(all, h)
		})
	}
	slices.SortFunc(all, func(a, b hoard) int {
		if a.idle != b.idle {
			if a.idle {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.memory, a.memory)
	})
	var s Shed
	for _, h := range all {
		if enough() {
			break
		}
		if h.t.closed { // by an owner that was told of another's end
			continue
		}
		if h.r != nil {
			h.r.end(EndHoard, http2.ErrCodeEnhanceYourCalm, hoardDetail)
		} else {
			h.st.User = hoarded{}
			h.t.s.H2.Reset(h.st, http2.ErrCodeEnhanceYourCalm)
			h.t.wantFlush()
		}
		s.Streams++
		s.Bytes += h.memory
	}
	s.Peer = peer
	if s.Streams > 0 && w.budget.shed != nil {
		w.budget.shed(s)
	}
}

// join makes the worker one of the budget's.
func (b *Budget) join(w *Worker) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.workers = append(b.workers, w)
}
