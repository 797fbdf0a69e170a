// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fake is an Enroller that writes down what it is told, and fails where it is
// told to.
type fake struct {
	t *testing.T

	mu     sync.Mutex // guards what follows
	events []string
	enrol  map[string][]error // by name: what the next enrolments answer
	end    map[string][]error
	takes  map[string]time.Duration // how long enrolment and end take
	moved  map[string]bool
	live   map[string]Pod
}

type fakeEnrolment struct {
	f *fake
	p Pod
}

func newFake(t *testing.T) *fake {
	return &fake{t: t, enrol: map[string][]error{}, end: map[string][]error{}, takes: map[string]time.Duration{}, moved: map[string]bool{}, live: map[string]Pod{}}
}

func (f *fake) note(format string, args ...any) {
	f.events = append(f.events, fmt.Sprintf(format, args...))
}

func next(m map[string][]error, key string) error {
	if len(m[key]) == 0 {
		return nil
	}
	err := m[key][0]
	m[key] = m[key][1:]
	return err
}

func (f *fake) Enrol(ctx context.Context, p Pod) (Enrolment, error) {
	f.mu.Lock()
	took := f.takes[p.Key()]
	f.mu.Unlock()
	if took > 0 {
		select {
		case <-time.After(took):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := next(f.enrol, p.Key()); err != nil {
		f.note("fail %s", p.Key())
		return nil, err
	}
	for _, o := range f.live {
		if o.conflicts(p) {
			f.t.Errorf("%s is enrolled while %s, its predecessor, is there", p.Key(), o.Key())
		}
	}
	f.live[p.Key()] = p
	f.note("enrol %s as %s", p.Key(), p.ServiceAccount)
	return fakeEnrolment{f, p}, nil
}

func (f *fake) Sweep(listed func() []Pod) error {
	var keys []string
	for _, p := range listed() {
		keys = append(keys, p.Key())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("sweep but %v", keys)
	return nil
}

func (e fakeEnrolment) End(how End) error {
	e.f.mu.Lock()
	took := e.f.takes[e.p.Key()]
	e.f.mu.Unlock()
	time.Sleep(took)
	e.f.mu.Lock()
	defer e.f.mu.Unlock()
	if err := next(e.f.end, e.p.Key()); err != nil {
		e.f.note("fail to end %s", e.p.Key())
		return err
	}
	delete(e.f.live, e.p.Key())
	e.f.note("%s %s", map[End]string{Release: "release", Refuse: "refuse"}[how], e.p.Key())
	return nil
}

func (e fakeEnrolment) Moved() bool {
	e.f.mu.Lock()
	defer e.f.mu.Unlock()
	moved := e.f.moved[e.p.Key()]
	delete(e.f.moved, e.p.Key())
	return moved
}

func (f *fake) took() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := f.events
	f.events = nil
	return out
}

// run runs a scenario in a bubble of its own time.
func run(t *testing.T, scenario func(t *testing.T, k *Keeper, f *fake)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		k := NewKeeper(Config{Enroller: f, Logger: slog.New(slog.DiscardHandler)})
		defer k.Close()
		scenario(t, k, f)
	})
}

// a pod called name, in a namespace and at an address of its own.
func a(name string) Pod {
	return Pod{Name: name, Namespace: "d", ServiceAccount: "sa-" + name, TrustDomain: "cluster.local", NetnsPath: "/run/netns/" + name,
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0." + fmt.Sprint(int(name[0])))}}
}

func same(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func status(k *Keeper) (out []string) {
	for _, s := range k.Status() {
		line := s.Pod.Key() + " " + s.State.String()
		if s.Failures > 0 {
			line += fmt.Sprintf(" failed %d times", s.Failures)
		}
		if s.Reason != "" {
			line += ": " + s.Reason
		}
		out = append(out, line)
	}
	return out
}

func TestEnrolmentIsAcknowledgedAndIdempotent(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		f.takes["d_x"] = time.Second
		if err := k.Wait(t.Context(), "d_x"); !errors.Is(err, ErrNotWanted) {
			t.Errorf("wait for a pod that is not listed: %v", err)
		}
		k.Set([]Pod{a("x")})
		begun := time.Now()
		if err := k.Wait(t.Context(), "d_x"); err != nil || time.Since(begun) != time.Second {
			t.Errorf("acknowledged after %v: %v", time.Since(begun), err)
		}
		for range 3 {
			k.Set([]Pod{a("x")})
			synctest.Wait()
		}
		same(t, "set again", f.took(), "enrol d_x as sa-x")
		same(t, "status", status(k), "d_x ready")
		k.Set(nil)
		synctest.Wait()
		same(t, "while it drains", status(k), "d_x draining")
		time.Sleep(time.Second)
		synctest.Wait()
		same(t, "at the end", f.took(), "release d_x")
		same(t, "status at the end", status(k))
	})
}

func TestFailuresAreTriedAgainWithTheReasonVisible(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		f.enrol["d_x"] = slices.Repeat([]error{errors.New("no such namespace")}, 12)
		begun := time.Now()
		k.Set([]Pod{a("x"), a("y")})
		if err := k.Tried(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		same(t, "after the first try", status(k), "d_x enrolling failed 1 times: no such namespace", "d_y ready")
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := k.Wait(ctx, "d_x"); err == nil || !strings.Contains(err.Error(), "no such namespace") {
			t.Errorf("the reason is not told to who waits: %v", err)
		}
		if err := k.Wait(t.Context(), "d_x"); err != nil {
			t.Fatal(err)
		}
		// 0.1+0.2+0.4+...+25.6 s, then 30 s each.
		if took, want := time.Since(begun), 51100*time.Millisecond+3*30*time.Second; took != want {
			t.Errorf("ready after %v, want %v", took, want)
		}
		same(t, "in the end", status(k), "d_x ready", "d_y ready")
	})
}

func TestSetTriesAtOnce(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		f.enrol["d_x"] = slices.Repeat([]error{errors.New("not yet")}, 9)
		k.Set([]Pod{a("x")})
		time.Sleep(26 * time.Second) // in the pause of 25.6 s
		synctest.Wait()
		begun := time.Now()
		k.Set([]Pod{a("x")})
		if err := k.Wait(t.Context(), "d_x"); err != nil || time.Since(begun) != 0 {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
	})
}

// A pod replaced under the same name is a new pod. In the same namespace nothing
// is in plaintext between the two; in another the first is released.
func TestReplacedUnderTheSameName(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		f.takes["d_x"] = time.Second
		k.Set([]Pod{a("x")})
		time.Sleep(2 * time.Second)
		other := a("x")
		other.ServiceAccount = "other"
		k.Set([]Pod{other})
		synctest.Wait()
		same(t, "in between", status(k), "d_x draining", "d_x enrolling: waits until pod d_x is gone")
		if err := k.Wait(t.Context(), "d_x"); err != nil {
			t.Fatal(err)
		}
		same(t, "the same namespace", f.took(), "enrol d_x as sa-x", "refuse d_x", "sweep but [d_x]", "enrol d_x as other")
		elsewhere := other
		elsewhere.NetnsPath = "/run/netns/elsewhere"
		k.Set([]Pod{elsewhere})
		if err := k.Wait(t.Context(), "d_x"); err != nil {
			t.Fatal(err)
		}
		same(t, "another namespace", f.took(), "release d_x", "enrol d_x as other")
	})
}

func TestReusedAddressWaitsForItsPredecessor(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		f.takes["d_x"] = time.Minute // its tunnels take long to end
		k.Set([]Pod{a("x")})
		time.Sleep(2 * time.Minute)
		y := a("y")
		y.Addresses = a("x").Addresses
		k.Set([]Pod{y, a("z")})
		if err := k.Wait(t.Context(), "d_z"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		same(t, "in between", status(k), "d_x draining", "d_y enrolling: waits until pod d_x is gone", "d_z ready")
		if err := k.Wait(t.Context(), "d_y"); err != nil {
			t.Fatal(err)
		}
		same(t, "order", f.took(), "enrol d_x as sa-x", "enrol d_z as sa-z", "release d_x", "enrol d_y as sa-y")
	})
}

func TestEndIsTriedUntilItIsDone(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		f.end["d_x"] = []error{errors.New("a rule stays"), errors.New("a rule stays")}
		k.Set([]Pod{a("x")})
		synctest.Wait()
		k.Set(nil)
		synctest.Wait()
		same(t, "the reason", status(k), "d_x draining failed 1 times: a rule stays")
		time.Sleep(time.Minute)
		synctest.Wait()
		same(t, "events", f.took(), "enrol d_x as sa-x", "fail to end d_x", "fail to end d_x", "release d_x")
		same(t, "in the end", status(k))
	})
}

// What is not listed any more before it was enrolled may have left something.
func TestSweepAfterAnEnrolmentThatCameToNothing(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		f.takes["d_x"] = time.Minute
		k.Set([]Pod{a("x"), a("y")})
		time.Sleep(time.Second)
		k.Set([]Pod{a("y")})
		synctest.Wait()
		same(t, "events", f.took(), "enrol d_y as sa-y", "sweep but [d_y]")
		same(t, "status", status(k), "d_y ready")
	})
}

// The successor in the same namespace is taken off the list while its predecessor
// is being ended for it.
func TestSuccessorIsNotWantedAnyMore(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		f.takes["d_x"] = time.Second
		k.Set([]Pod{a("x")})
		time.Sleep(2 * time.Second)
		y := a("y")
		y.NetnsPath = a("x").NetnsPath
		k.Set([]Pod{y})
		synctest.Wait()
		k.Set(nil)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		events := f.took()
		if n := len(events); n < 2 || events[n-2] != "refuse d_x" || events[n-1] != "sweep but []" {
			t.Errorf("events %q: want what is left refused to be swept", events)
		}
	})
}

func TestAnotherNamespaceBehindThePathIsANewPod(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		k.Set([]Pod{a("x")})
		synctest.Wait()
		f.mu.Lock()
		f.moved["d_x"] = true
		f.mu.Unlock()
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		same(t, "events", f.took(), "enrol d_x as sa-x", "release d_x", "enrol d_x as sa-x")
		same(t, "status", status(k), "d_x ready")
	})
}

// A process that ends leaves its pods refused, and gives up what does not end.
func TestCloseRefuses(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		f.takes["d_z"] = time.Hour
		f.enrol["d_z"] = nil
		f.end["d_y"] = slices.Repeat([]error{errors.New("stuck")}, 100)
		k.Set([]Pod{a("x"), a("y"), a("z")})
		synctest.Wait()
		f.took()
		begun := time.Now()
		if err := k.Close(); err != nil || time.Since(begun) > time.Minute {
			t.Errorf("closed after %v: %v", time.Since(begun), err)
		}
		events := f.took()
		slices.Sort(events)
		same(t, "events", events, "fail to end d_y", "refuse d_x")
		k.Set([]Pod{a("w")})
		same(t, "set after close", status(k))
	})
}

func TestEnrolmentsAtOnceAreBounded(t *testing.T) {
	run(t, func(t *testing.T, k *Keeper, f *fake) {
		var pods []Pod
		for i := range 40 {
			p := a("p")
			p.Name = fmt.Sprintf("p%d", i)
			p.NetnsPath += p.Name
			p.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})}
			f.takes[p.Key()] = time.Second
			pods = append(pods, p)
		}
		begun := time.Now()
		k.Set(pods)
		if err := k.Tried(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took != 5*time.Second {
			t.Errorf("40 enrolments of 1 s, 8 at once, took %v", took)
		}
	})
}
