// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/snapshot"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// asked is a connection that only counts what it is asked.
type asked struct {
	live  live
	rests uint64
	times int
	then  func() // what its end does

	told    int
	telling func() // what happens when it is told of
}

func (a *asked) version() uint64 { return a.rests }

func (a *asked) seen() *telemetry.Connection {
	a.told++
	if a.telling != nil {
		a.telling()
	}
	return &telemetry.Connection{}
}

func (a *asked) count() {}

func (a *asked) kind() int { return kindPlain }

func (a *asked) recheck(s *snapshot.Snapshot) {
	a.times++
	a.rests = s.Version
	if a.then != nil {
		a.then()
	}
}

// onLoop makes a worker and runs steps on its loop, one after the other; what a
// step leaves to later turns is done before the next one.
func onLoop(t *testing.T, steps ...func(w *worker)) {
	t.Helper()
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{Worker: relay.NewWorker(l, nil), entries: map[poolKey]*entry{}, retired: map[*entry]struct{}{}}
	w.t = &Tunnel{cfg: Config{Snapshots: snapshot.NewStore()}}
	done := make(chan struct{})
	go func() { defer close(done); l.Run() }()
	defer func() { l.Stop(); <-done }()
	for _, step := range steps {
		l.Post(func() { step(w) })
		idle := make(chan bool)
		deadline := time.Now().Add(5 * time.Second)
		for {
			l.Post(func() { idle <- !w.lives.asking && len(w.lives.walks) == 0 })
			if <-idle {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the walk does not end")
			}
		}
	}
}

func snap(version uint64) *snapshot.Snapshot {
	return &snapshot.Snapshot{Version: version, Policy: policy.NewSet(nil)}
}

func TestRecheckAsksEachOnceInBoundedTurns(t *testing.T) {
	const many = 3*recheckShare + 7
	conns := make([]*asked, many)
	onLoop(t,
		func(w *worker) {
			w.recheck(snap(1))
			for i := range conns {
				conns[i] = &asked{rests: 1}
				conns[i].live.conn = conns[i]
				w.link(&conns[i].live)
			}
		},
		func(w *worker) {
			w.recheck(snap(2))
			n := 0
			for _, c := range conns {
				n += c.times
			}
			if n != recheckShare {
				t.Errorf("one turn asked %d", n)
			}
			w.recheck(snap(2)) // told again
		},
		func(w *worker) {
			for i, c := range conns {
				if c.times != 1 || c.rests != 2 {
					t.Fatalf("connection %d was asked %d times, rests on %d", i, c.times, c.rests)
				}
			}
			// A newer one while the recheck is under way, then an older one.
			w.recheck(snap(3))
			w.recheck(snap(4))
			w.recheck(snap(3))
		},
		func(*worker) {
			for i, c := range conns {
				if c.rests != 4 || c.times > 3 {
					t.Fatalf("connection %d rests on %d, asked %d times", i, c.rests, c.times)
				}
			}
		})
}

// Connections end and begin while the list is gone through.
func TestRecheckOfAListThatChanges(t *testing.T) {
	var list []*asked
	add := func(w *worker, rests uint64) *asked {
		a := &asked{rests: rests}
		a.live.conn = a
		list = append(list, a)
		w.link(&a.live)
		return a
	}
	onLoop(t,
		func(w *worker) {
			w.recheck(snap(1))
			for range 9 {
				add(w, 1)
			}
			// The newest are asked first. Each that ends takes its neighbours along.
			list[6].then = func() {
				list[6].live.unlink()
				list[5].live.unlink() // the next to be asked
				list[8].live.unlink() // asked already
				list[4].live.unlink()
			}
			list[2].then = func() { list[2].live.unlink(); list[0].live.unlink() }
			w.recheck(snap(2))
		},
		func(w *worker) {
			for i, times := range []int{0, 1, 1, 1, 0, 0, 1, 1, 1} {
				if list[i].times != times {
					t.Errorf("connection %d was asked %d times, want %d", i, list[i].times, times)
				}
			}
			// One that was decided before the snapshot and comes after it.
			for w.t.cfg.Snapshots.Load().Version < 2 {
				w.t.cfg.Snapshots.Publish(nil, nil)
			}
			if late := add(w, 1); late.times != 1 || late.rests != 2 {
				t.Errorf("a late one was asked %d times", late.times)
			}
			if early := add(w, 3); early.times != 0 {
				t.Error("one that rests on a newer snapshot was asked")
			}
			n := 0
			for l := w.lives.head; l != nil; l = w.lives.head {
				n++
				l.unlink()
				l.unlink() // idempotent
			}
			if n != 5 {
				t.Errorf("%d were in the list, want 5", n)
			}
		})
}

// A connection that was decided before a snapshot and comes to its loop after it
// is asked then, though the loop has not been told of the snapshot yet.
func TestALateConnectionIsAskedBeforeItsLoopIsTold(t *testing.T) {
	onLoop(t, func(w *worker) {
		late := &asked{rests: w.t.cfg.Snapshots.Load().Version}
		at := w.t.cfg.Snapshots.Publish(nil, policy.NewSet(nil)).Version
		late.live.conn = late
		w.link(&late.live)
		if late.times != 1 || late.rests != at {
			t.Errorf("it was asked %d times, rests on %d, want %d", late.times, late.rests, at)
		}
	})
}
