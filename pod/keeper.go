// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Enroller does for one pod what a Keeper decides. Its methods are called from
// several goroutines, never at once for pods of one name, namespace or address.
type Enroller interface {
	// Enrol returns when p's connections are carried. After an error p is as
	// it was found, or refused, but nothing is held: it may be tried again.
	Enrol(ctx context.Context, p Pod) (Enrolment, error)
	// Sweep releases what earlier processes, or enrolments that came to
	// nothing, have left of pods that are not listed. It asks for the list
	// while no enrolment runs.
	Sweep(listed func() []Pod) error
}

// Enrolment is a pod that is carried.
type Enrolment interface {
	// End returns when none of the pod's listeners, tunnels and connections
	// is left. With Release its traffic is then as before its enrolment; with
	// Refuse it stays captured, and is refused. After an error it is called
	// again.
	End(how End) error
	// Moved reports whether the pod's path leads to another network namespace
	// by now: the pod was replaced, and nobody said so.
	Moved() bool
}

// End is what becomes of an enrolled pod's traffic.
type End uint8

// The ends.
const (
	Release End = iota // as before its enrolment
	Refuse             // refused: a successor in the same namespace, or a next process, goes on
)

// State is where a pod is in its life.
type State uint8

// The states, in their order. A pod never goes back: one that comes again is a
// new pod.
const (
	Enrolling State = iota // being enrolled, or to be tried again
	Ready                  // carried
	Draining               // no longer wanted; tunnels and connections are being ended
	Gone
)

func (s State) String() string {
	return [...]string{"enrolling", "ready", "draining", "gone"}[s]
}

// States returns all of them, in order.
func States() []State { return []State{Enrolling, Ready, Draining, Gone} }

// Status is what is known of a pod's life.
type Status struct {
	Pod      Pod
	State    State
	Since    time.Time // of the state
	Failures int       // of the present state
	Reason   string    // what the last failure was, or what is waited for; empty: nothing
}

// Config has what a Keeper needs. Enroller and Logger are required.
type Config struct {
	Enroller Enroller
	Logger   *slog.Logger

	// RetryMin is the pause after a first failure; it doubles up to RetryMax.
	// 0: 100 ms and 30 s.
	RetryMin, RetryMax time.Duration
	// CheckEvery is how often a carried pod's namespace is looked at. 0: 1 s.
	CheckEvery time.Duration
	// AtOnce bounds the enrolments that run at once; loading a pod's program
	// takes memory and a CPU. 0: 8.
	AtOnce int
}

// Keeper keeps the pods enrolled that are to be: it is the one state machine of
// every pod's life, enrolling, ready, draining, gone. Failures are tried again
// with growing pauses. A pod that comes under the name, the namespace or an
// address of another waits until that one is gone, its tunnels first.
//
// The Keeper knows neither redirection nor tunnels; its Enroller does. Close
// ends it.
type Keeper struct {
	cfg    Config
	slots  chan struct{} // one token per running enrolment
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex // guards what follows, and the lives' fields that say so
	closed  bool
	wanted  []Pod
	lives   map[string]*life   // of the wanted pods, by key
	all     map[*life]struct{} // and of those that are not gone yet
	changed chan struct{}      // closed at the next change of a Status
}

// life is one pod's.
type life struct {
	pod    Pod
	after  []*life // those that must be gone first
	ctx    context.Context
	cancel context.CancelFunc // it is not wanted any more
	kick   chan struct{}      // try now
	gone   chan struct{}

	// Guarded by Keeper.mu.
	status Status
	tried  bool
	end    End
}

// NewKeeper makes a Keeper that has no pods.
func NewKeeper(cfg Config) *Keeper {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&cfg.RetryMin, 100*time.Millisecond)
	def(&cfg.RetryMax, 30*time.Second)
	def(&cfg.CheckEvery, time.Second)
	if cfg.AtOnce == 0 {
		cfg.AtOnce = 8
	}
	k := &Keeper{cfg: cfg, slots: make(chan struct{}, cfg.AtOnce), lives: map[string]*life{}, all: map[*life]struct{}{}, changed: make(chan struct{})}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k
}

// Set says which pods are to be enrolled, of which each Key is there once. It
// does not wait. Pods that are there already, the same in every field, are left
// alone; those that could not be enrolled yet are tried at once.
func (k *Keeper) Set(pods []Pod) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return
	}
	k.wanted = slices.Clone(pods)
	want := make(map[string]Pod, len(pods))
	paths := make(map[string]bool, len(pods))
	for _, p := range pods {
		want[p.Key()] = p
		paths[p.NetnsPath] = true
	}
	for key, l := range k.lives {
		p, listed := want[key]
		if listed && l.pod.equal(p) {
			if l.status.State == Enrolling {
				select {
				case l.kick <- struct{}{}:
				default:
				}
			}
			continue
		}
		if paths[l.pod.NetnsPath] {
			l.end = Refuse // no plaintext between it and its successor
		}
		l.cancel()
		delete(k.lives, key)
	}
	for _, p := range pods {
		if k.lives[p.Key()] == nil {
			k.begin(p)
		}
	}
}

// begin starts a life. The caller holds mu.
func (k *Keeper) begin(p Pod) {
	l := &life{pod: p, kick: make(chan struct{}, 1), gone: make(chan struct{})}
	l.status = Status{Pod: p, Since: time.Now()}
	for other := range k.all {
		if other.pod.conflicts(p) {
			l.after = append(l.after, other)
		}
	}
	l.ctx, l.cancel = context.WithCancel(k.ctx)
	k.lives[p.Key()] = l
	k.all[l] = struct{}{}
	k.note()
	k.wg.Go(func() { k.live(l) })
}

// live is a pod's life.
func (k *Keeper) live(l *life) {
	defer k.bury(l)
	for _, other := range l.after {
		k.set(l, Enrolling, 0, "waits until pod "+other.pod.Key()+" is gone")
		select {
		case <-other.gone:
		case <-l.ctx.Done():
			return
		}
	}
	e := k.enrol(l)
	if e == nil {
		return
	}
	k.set(l, Ready, 0, "")
	k.watch(l, e)
	k.set(l, Draining, 0, "")
	k.drain(l, e)
}

// enrol enrols the pod; nil when it is not wanted any more.
func (k *Keeper) enrol(l *life) Enrolment {
	for failures := 0; ; {
		k.set(l, Enrolling, failures, "")
		select {
		case k.slots <- struct{}{}:
		case <-l.ctx.Done():
			return nil
		}
		e, err := k.cfg.Enroller.Enrol(l.ctx, l.pod)
		<-k.slots
		if err == nil {
			return e
		}
		if l.ctx.Err() != nil {
			return nil
		}
		failures++
		pause := k.pause(failures)
		k.cfg.Logger.Error("pod is not enrolled", "pod", l.pod.Key(), "err", err, "failures", failures, "again_in", pause)
		k.set(l, Enrolling, failures, err.Error())
		select {
		case <-time.After(pause):
		case <-l.kick:
		case <-l.ctx.Done():
			return nil
		}
	}
}

// pause is how long to wait after so many failures.
func (k *Keeper) pause(failures int) time.Duration {
	d := k.cfg.RetryMin
	for i := 1; i < failures && d < k.cfg.RetryMax; i++ {
		d *= 2
	}
	return min(d, k.cfg.RetryMax)
}

// watch returns when the pod is not wanted any more, or was replaced behind its
// path.
func (k *Keeper) watch(l *life, e Enrolment) {
	tick := time.NewTicker(k.cfg.CheckEvery)
	defer tick.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-tick.C:
			if e.Moved() && k.replace(l) {
				return
			}
		}
	}
}

// replace begins a successor of the same description, and reports whether
// the pod was still wanted.
func (k *Keeper) replace(l *life) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || k.lives[l.pod.Key()] != l {
		return false // it is being ended anyway
	}
	k.cfg.Logger.Info("pod has another network namespace: it is a new pod", "pod", l.pod.Key(), "netns", l.pod.NetnsPath)
	l.end = Release
	l.cancel()
	k.begin(l.pod)
	return true
}

// drain ends the enrolment, and tries until it has.
func (k *Keeper) drain(l *life, e Enrolment) {
	for failures := 0; ; {
		k.mu.Lock()
		how, closed := l.end, k.closed
		k.mu.Unlock()
		if closed {
			how = Refuse
		}
		err := e.End(how)
		if err == nil {
			k.cfg.Logger.Info("pod has left", "pod", l.pod.Key(), "released", how == Release)
			return
		}
		failures++
		pause := k.pause(failures)
		k.cfg.Logger.Error("pod does not leave", "pod", l.pod.Key(), "err", err, "failures", failures, "again_in", pause)
		k.set(l, Draining, failures, err.Error())
		select {
		case <-time.After(pause):
		case <-k.ctx.Done():
			if closed {
				return // what is left stays written down for the next process
			}
		}
	}
}

// bury ends a life. What an enrolment that came to nothing has left is swept, and
// what was left for a successor that is not wanted any more.
func (k *Keeper) bury(l *life) {
	k.mu.Lock()
	left := l.status.State == Enrolling || l.end == Refuse
	l.tried = true
	closed := k.closed
	k.mu.Unlock()
	if left && !closed { // before a successor goes on
		if err := k.cfg.Enroller.Sweep(k.listed); err != nil {
			k.cfg.Logger.Error("sweep after a pod", "pod", l.pod.Key(), "err", err)
		}
	}
	k.mu.Lock()
	delete(k.all, l)
	close(l.gone)
	k.note()
	k.mu.Unlock()
}

func (k *Keeper) listed() []Pod {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.wanted
}

// Sweep releases what earlier processes have left of pods that are not wanted.
// Until then they are refused.
func (k *Keeper) Sweep() error { return k.cfg.Enroller.Sweep(k.listed) }

func (k *Keeper) set(l *life, s State, failures int, reason string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.status.State != s {
		l.status.Since = time.Now()
	}
	l.status.State, l.status.Failures, l.status.Reason = s, failures, reason
	if s == Ready || failures > 0 {
		l.tried = true
	}
	k.note()
}

// note tells those who wait. The caller holds mu.
func (k *Keeper) note() {
	close(k.changed)
	k.changed = make(chan struct{})
}

// ErrNotWanted says of a pod that it is not to be enrolled.
var ErrNotWanted = errors.New("pod is not listed")

// Wait returns when the pod of this key is ready; with ErrNotWanted when none is
// wanted; or when ctx ends, with the reason why it is not ready yet.
func (k *Keeper) Wait(ctx context.Context, key string) error {
	for {
		k.mu.Lock()
		l, changed := k.lives[key], k.changed
		var s Status
		if l != nil {
			s = l.status
		}
		k.mu.Unlock()
		switch {
		case l == nil:
			return ErrNotWanted
		case s.State == Ready:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if s.Reason != "" {
				return errors.Join(context.Cause(ctx), errors.New(s.Reason))
			}
			return context.Cause(ctx)
		}
	}
}

// Tried returns when each wanted pod is ready or has failed at least once, or
// when ctx ends.
func (k *Keeper) Tried(ctx context.Context) error {
	for {
		k.mu.Lock()
		changed, waiting := k.changed, false
		for _, l := range k.lives {
			waiting = waiting || !l.tried
		}
		k.mu.Unlock()
		if !waiting {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Status returns the lives of all pods that are not gone, by key; a draining
// one before its successor.
func (k *Keeper) Status() []Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := make([]Status, 0, len(k.all))
	for l := range k.all {
		out = append(out, l.status)
	}
	slices.SortFunc(out, func(a, b Status) int {
		if a.Pod.Key() != b.Pod.Key() {
			if a.Pod.Key() < b.Pod.Key() {
				return -1
			}
			return 1
		}
		return int(b.State) - int(a.State)
	})
	return out
}

// Close ends every pod's enrolment, to be refused until a next process goes on,
// and waits until they have ended. Idempotent.
func (k *Keeper) Close() error {
	k.mu.Lock()
	k.closed = true
	k.mu.Unlock()
	k.cancel()
	k.wg.Wait()
	return nil
}
