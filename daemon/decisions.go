// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/snapshot"
	"github.com/culvert-mesh/culvert/telemetry"
)

const (
	// decisionLines is how many lines a second each pod has for each decision,
	// and how many at once: what a pod that tries in a loop, or who knocks at its
	// ports, can write into the log.
	decisionLines = 10
	// decisionBuckets bounds the pods and decisions that are told apart, of some
	// 100 bytes each: beyond it those that were not used lately are forgotten.
	decisionBuckets = 8192
)

// decision is what becomes of a decision of the programs in the access log.
type decision struct {
	event     telemetry.Event
	direction policy.Direction
	reason    telemetry.Reason
	security  telemetry.SecurityPolicy
	detail    string
}

// loggedDecisions are those that the tunnel never hears of.
func loggedDecisions() map[string]decision {
	out := func(r telemetry.Reason, detail string) decision {
		return decision{telemetry.Refused, policy.Outbound, r, telemetry.SecurityUnknown, detail}
	}
	return map[string]decision{
		"connect_refused_unknown":     out(telemetry.ReasonUnknownDestination, "refused in connect(): the address is of the mesh, and no workload has it: add it to the workloads, or take its range out of mesh.cidrs"),
		"connect_refused_destination": out(telemetry.ReasonNoEndpoint, "refused in connect(): nothing answers at this address now"),
		"connect_refused_no_listener": out(telemetry.ReasonDraining, "refused in connect(): no ztunnel served the pod then, or it was being enrolled (`ztunnel pods`)"),
		"connect_refused_no_address":  out(telemetry.ReasonUnreachable, "refused in connect(): the pod has no address of this family in the mesh: give it one, in the pods and the workloads file"),
		"connect_refused_device":      out(telemetry.ReasonRefused, "refused in connect(): the socket is bound to a device, and cannot be released from it"),
		"connect_refused_no_mark":     out(telemetry.ReasonRefused, "refused in connect(): the kernel did not let the socket be marked"),
		"connect_refused_no_socket":   out(telemetry.ReasonRefused, "refused in connect(): the kernel did not tell the socket"),
		"tcp_destination":             {telemetry.Passed, policy.Outbound, telemetry.ReasonOK, telemetry.Plaintext, "in plaintext past the tunnel: the workload says protocol: tcp. Its bytes and its end are not seen"},
		"strict_refused":              {telemetry.Refused, policy.Inbound, telemetry.ReasonDenied, telemetry.SecurityUnknown, "plaintext from outside, refused at its SYN: enrol its client, or let plaintext in to this port by the mode"},
	}
}

// decisionLog writes what only the kernel sees into the access log: connections
// that were refused before there was one, and those that pass by in plaintext.
// The kernel never waits for it. Who floods it is counted, not written.
type decisionLog struct {
	record     func(*telemetry.Connection)
	store      *snapshot.Store
	log        *slog.Logger
	known      map[string]decision
	suppressed *prometheus.CounterVec

	buckets map[bucketKey]*bucket // of the goroutine that has the events

	mu     sync.Mutex // guards what follows
	pods   map[string]pod.Pod
	warned map[string]bool // pods that have refused plaintext, by key
}

type bucketKey struct{ pod, decision string }

// bucket bounds the lines of a pod and a decision.
type bucket struct {
	left    float64 // lines
	at      time.Time
	skipped uint64 // since the last line
}

func newDecisionLog(record func(*telemetry.Connection), store *snapshot.Store, log *slog.Logger, registry *prometheus.Registry) *decisionLog {
	d := &decisionLog{
		record: record, store: store, log: log, known: loggedDecisions(), buckets: map[bucketKey]*bucket{}, pods: map[string]pod.Pod{}, warned: map[string]bool{},
		suppressed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_access_log_suppressed_total",
			Help: "Decisions in the kernel that have no line of their own in the access log, since a pod had too many of them at once.",
		}, []string{"decision"}),
	}
	for name := range d.known {
		d.suppressed.WithLabelValues(name)
	}
	registry.MustRegister(d.suppressed)
	return d
}

func (d *decisionLog) add(p pod.Pod) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pods[p.Key()] = p
}

func (d *decisionLog) remove(p pod.Pod) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.pods, p.Key())
	delete(d.warned, p.Key())
}

// run writes until ctx ends. It is tried again where the kernel's side fails.
func (d *decisionLog) run(ctx context.Context, events func(context.Context, func(redirect.Event)) error) {
	const pause = 10 * time.Second
	for ctx.Err() == nil {
		err := events(ctx, d.take)
		if err == nil {
			return
		}
		d.log.Error("the access log lacks what the kernel refuses; it is tried again", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// take is one event.
func (d *decisionLog) take(e redirect.Event) {
	if e.Decision == "option_refused" {
		if _, ok := d.admit(e); ok {
			d.log.Warn("an option was refused that would have taken a carried connection past the tunnel", "pod", e.Pod, "src", e.Src.String(), "dst", e.Dst.String())
		}
		return
	}
	known, ok := d.known[e.Decision]
	if !ok {
		return
	}
	if e.Decision == "strict_refused" {
		d.warn(e)
	}
	skipped, ok := d.admit(e)
	if !ok {
		d.suppressed.WithLabelValues(e.Decision).Inc()
		return
	}
	d.record(d.connection(e, known, skipped))
}

// warn logs the first plaintext that a pod refuses, with the mend: who has just
// enrolled it looks at the log, and sees that a client or a probe has failed. The
// access log has each one.
func (d *decisionLog) warn(e redirect.Event) {
	d.mu.Lock()
	p, ok := d.pods[e.Pod]
	told := d.warned[e.Pod]
	if ok {
		d.warned[e.Pod] = true
	}
	d.mu.Unlock()
	if !ok || told {
		return
	}
	d.log.Warn("plaintext from outside was refused; further ones of this pod are in the access log only", "pod", e.Pod, "src", e.Src.String(), "dst", e.Dst.String(), "hint", strictHint(p, e.Dst.Port()))
}

// strictHint has the entry of the policy file that lets plaintext in, to copy.
func strictHint(p pod.Pod, port uint16) string {
	return fmt.Sprintf("enrol its client, on its own node; or let plaintext in at this port, in the policy file: modes: [{name: %s-%d, namespace: %s, workload: %s, ports: {%d: permissive}}]; a health probe can be made an exec probe instead", p.Name, port, p.Namespace, p.Name, port)
}

// admit says whether there is a line for an event, and how many like it had none
// before.
func (d *decisionLog) admit(e redirect.Event) (skipped uint64, ok bool) {
	k := bucketKey{e.Pod, e.Decision}
	b := d.buckets[k]
	if b == nil {
		if len(d.buckets) >= decisionBuckets {
			d.forget(e.Time)
		}
		b = &bucket{left: decisionLines, at: e.Time}
		d.buckets[k] = b
	}
	if since := e.Time.Sub(b.at); since > 0 {
		b.left = min(decisionLines, b.left+since.Seconds()*decisionLines)
		b.at = e.Time
	}
	if b.left < 1 {
		b.skipped++
		return 0, false
	}
	b.left--
	skipped, b.skipped = b.skipped, 0
	return skipped, true
}

// forget drops what would be full again by now, or else everything: the lines are
// bounded by the memory, and not the memory by the lines.
func (d *decisionLog) forget(now time.Time) {
	for k, b := range d.buckets {
		if now.Sub(b.at) > time.Second {
			delete(d.buckets, k)
		}
	}
	if len(d.buckets) >= decisionBuckets {
		clear(d.buckets)
	}
}

func (d *decisionLog) connection(e redirect.Event, known decision, skipped uint64) *telemetry.Connection {
	c := &telemetry.Connection{
		Event: known.event, Direction: known.direction, Reason: known.reason, SecurityPolicy: known.security, Detail: known.detail,
		Src: telemetry.Endpoint{Addr: e.Src}, Dst: telemetry.Endpoint{Addr: e.Dst}, Start: e.Time,
	}
	if e.Comm != "" {
		c.Detail += fmt.Sprintf(" (process %q of user %d)", e.Comm, e.UID)
	}
	if skipped > 0 {
		c.Detail += fmt.Sprintf("; %d more like it have no line", skipped)
	}
	snap := d.store.Load()
	c.PolicyVersion = snap.Version
	ours, theirs := &c.Src, &c.Dst
	if known.direction == policy.Inbound {
		ours, theirs = theirs, ours
	}
	d.mu.Lock()
	p, ok := d.pods[e.Pod]
	d.mu.Unlock()
	named := func(e *telemetry.Endpoint) { // by its address: that proves no identity
		if w, ok := snap.Workloads.ByAddr(e.Addr.Addr()); ok {
			e.Workload, e.Namespace = w.Name, w.Namespace
		}
	}
	if ok {
		ours.Workload, ours.Namespace, ours.Identity = p.Name, p.Namespace, p.Identity()
	} else {
		named(ours) // it is refused, between two enrolments
	}
	named(theirs)
	if e.Decision == "strict_refused" {
		_, c.Rule = snap.Policy.Mode(c.Dst.Namespace, c.Dst.Workload, c.Dst.Addr.Port())
	}
	return c
}
