// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

const (
	// lookAgainAfter is when an enrolled pod is looked at a second time: for
	// what was in connect(), past the hook, at the first.
	lookAgainAfter = time.Second
	// scrapeLooks bounds the time that one scrape spends on looking whether the
	// connections that are known still live: 1 ms a pod or so. The pods whose
	// turn did not come are told as they were seen last.
	scrapeLooks = 200 * time.Millisecond
)

// beside is where a pod's connections beside the tunnel are found and ended.
type beside interface {
	Existing() ([]redirect.Existing, error)
	Reset(redirect.Existing) error
}

// tupler keeps a pod's deliveries clear of a connection.
type tupler interface {
	HoldTuple(client, local netip.AddrPort)
	DropTuple(client, local netip.AddrPort)
}

// existing keeps watch over connections from before their pods' enrolment: they
// are in plaintext. It says so in the log, counts them until they end, or ends
// them at once.
type existing struct {
	reset bool
	log   *slog.Logger
	desc  *prometheus.Desc

	wg   sync.WaitGroup
	stop chan struct{}
	kick chan struct{} // look at all pods

	mu   sync.Mutex // guards pods
	pods map[*existingPod]struct{}
}

// existingPod is a pod that is looked at.
type existingPod struct {
	key   string
	pod   beside
	clear tupler

	mu    sync.Mutex // one look at a time, and none once it is gone
	gone  bool
	found []redirect.Existing // at the last look that did not fail
	seen  time.Time           // when that was; zero: there was none
	said  string              // why the last look failed, as it was logged
}

func newExisting(reset bool, log *slog.Logger) *existing {
	x := &existing{
		reset: reset, log: log, stop: make(chan struct{}), kick: make(chan struct{}, 1), pods: map[*existingPod]struct{}{},
		desc: prometheus.NewDesc("culvert_existing_connections", "Connections of a pod with the mesh that are older than its enrolment, and in plaintext.", []string{"pod"}, nil),
	}
	x.wg.Go(x.run)
	return x
}

// close ends the looking and waits for it. Idempotent it is not.
func (x *existing) close() error {
	close(x.stop)
	x.wg.Wait()
	return nil
}

// run looks at all pods when it is told to: an address that is new in the mesh
// may be one that a pod is connected to.
func (x *existing) run() {
	for {
		select {
		case <-x.stop:
			return
		case <-x.kick:
		}
		for _, p := range x.all() {
			x.look(p)
		}
	}
}

// changed has all pods looked at. It does not wait.
func (x *existing) changed() {
	select {
	case x.kick <- struct{}{}:
	default:
	}
}

// add looks at a pod that has just been enrolled, and once more after a while.
func (x *existing) add(key string, pod beside, clear tupler) *existingPod {
	p := &existingPod{key: key, pod: pod, clear: clear}
	x.mu.Lock()
	x.pods[p] = struct{}{}
	x.mu.Unlock()
	x.look(p)
	x.wg.Go(func() {
		select {
		case <-x.stop:
		case <-time.After(lookAgainAfter):
			x.look(p)
		}
	})
	return p
}

// remove forgets a pod, and returns how many of its connections are still there.
// Its namespace is not used after.
func (x *existing) remove(p *existingPod) int {
	x.mu.Lock()
	delete(x.pods, p)
	x.mu.Unlock()
	if p.count() > 0 {
		x.look(p)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = true
	return len(p.found)
}

// all are the pods, by name.
func (x *existing) all() []*existingPod {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.SortedFunc(maps.Keys(x.pods), func(a, b *existingPod) int { return cmp.Compare(a.key, b.key) })
}

// look looks at a pod now, says what has changed, and returns what it has found.
func (x *existing) look(p *existingPod) ([]redirect.Existing, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return nil, nil
	}
	found, err := p.pod.Existing()
	if err != nil {
		if p.said != err.Error() {
			p.said = err.Error()
			x.log.Error("cannot look for connections from before the enrolment: if there are any, they go on in plaintext", "pod", p.key, "err", err)
		}
		return p.found, err
	}
	p.said = ""
	if x.reset {
		found = x.end(p, found)
	}
	before := len(p.found)
	p.keepClear(found)
	p.found, p.seen = found, time.Now()
	switch n := len(found); {
	case n > before:
		x.log.Warn("connections of the pod with the mesh are older than its enrolment: they go on in plaintext until they end", "pod", p.key, "connections", n,
			"hint", "`ztunnel connections --plaintext` lists them; restart what has them, or set existing: reset")
	case n == 0 && before > 0:
		x.log.Info("the last connection from before the enrolment has ended", "pod", p.key)
	}
	return found, nil
}

// keepClear keeps deliveries clear of what is found now, and no longer of what has
// ended. The caller holds mu.
func (p *existingPod) keepClear(found []redirect.Existing) {
	type tuple struct{ client, local netip.AddrPort }
	ended := map[tuple]bool{}
	for _, c := range p.found {
		ended[tuple{c.Remote, c.Local}] = true
	}
	for _, c := range found {
		t := tuple{c.Remote, c.Local}
		if !ended[t] {
			p.clear.HoldTuple(t.client, t.local)
		}
		delete(ended, t)
	}
	for t := range ended {
		p.clear.DropTuple(t.client, t.local)
	}
}

// end resets connections, and returns those that it could not.
func (x *existing) end(p *existingPod, found []redirect.Existing) (left []redirect.Existing) {
	ended := 0
	var failed error
	for _, c := range found {
		err := p.pod.Reset(c)
		if err == nil {
			ended++
			continue
		}
		failed = err
		left = append(left, c)
		if errors.Is(err, sockdiag.ErrNoDestroy) {
			left = found
			break
		}
	}
	if ended > 0 {
		x.log.Warn("connections of the pod with the mesh were older than its enrolment, in plaintext: they are reset", "pod", p.key, "connections", ended)
	}
	if failed != nil && len(left) > len(p.found) { // else it was said
		x.log.Error("connections from before the enrolment cannot be reset", "pod", p.key, "connections", len(left), "err", failed)
	}
	return left
}

// Describe is prometheus.Collector's.
func (x *existing) Describe(ch chan<- *prometheus.Desc) { ch <- x.desc }

// Collect is prometheus.Collector's. Only pods that have such connections are
// looked at: there come no new ones.
func (x *existing) Collect(ch chan<- prometheus.Metric) {
	pods := x.all()
	byAge := slices.Clone(pods)
	slices.SortStableFunc(byAge, func(a, b *existingPod) int { return a.last().Compare(b.last()) })
	begun := time.Now()
	for _, p := range byAge {
		if p.count() > 0 && time.Since(begun) < scrapeLooks {
			x.look(p)
		}
	}
	for _, p := range pods {
		if p.last().IsZero() {
			continue // how many it has is not known
		}
		ch <- prometheus.MustNewConstMetric(x.desc, prometheus.GaugeValue, float64(p.count()), p.key)
	}
}

func (p *existingPod) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.found)
}

func (p *existingPod) last() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen
}
