// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// maxSeries bounds the pairs of workloads that are counted apart (about 5 KiB
	// each); pairs beyond it are counted together, as workload "other".
	maxSeries = 8192
	// idleSeries is how long a pair is kept that has no connection, once there are
	// as many pairs as there may be. To a reader that is a counter which starts
	// again: the pods of last month do not push those of today into "other".
	idleSeries = time.Hour
	// sweepEvery is how often those are looked for where there were no more.
	sweepEvery = time.Minute
	// sweepShare is how many of them are dropped at once, some 3 us each: event
	// loops wait for it.
	sweepShare = 64
)

// labels of the traffic counters: those of Istio's that are known here.
func labels() []string {
	return []string{
		"reporter",
		"source_workload", "source_workload_namespace", "source_principal",
		"destination_workload", "destination_workload_namespace", "destination_principal",
		"connection_security_policy",
	}
}

// pair is the key of a series: everything that the labels are made of.
type pair struct {
	reporter         Reporter
	source, target   string
	sourceNS, destNS string
	sourceID, destID spiffeid.ID
	security         SecurityPolicy
}

// other is the pair that stands for all those beyond maxSeries.
func (p pair) other() pair {
	const other = "other"
	return pair{
		reporter: p.reporter,
		source:   other, sourceNS: other,
		target: other, destNS: other,
		security: p.security,
	}
}

// series has the counters of one pair.
type series struct {
	opened, closed, sent, received prometheus.Counter

	live atomic.Int64 // connections that are open; those that open hold the traffic's mu
	used atomic.Int64 // when one last was opened or ended, in Unix nanoseconds
}

// traffic finds series.
type traffic struct {
	opened, closed, sent, received *prometheus.CounterVec

	mu    sync.RWMutex
	known map[pair]*series // guarded by mu
	swept time.Time        // guarded by mu; by the times of connections, as used is
}

func (t *traffic) init(r prometheus.Registerer) {
	vec := func(name, help string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels())
		r.MustRegister(v)
		return v
	}
	t.opened = vec("istio_tcp_connections_opened_total", "Connections of applications that were let through.")
	t.closed = vec("istio_tcp_connections_closed_total", "Connections of applications that were let through and have ended.")
	t.sent = vec("istio_tcp_sent_bytes_total", "Bytes sent by the destination, to the client.")
	t.received = vec("istio_tcp_received_bytes_total", "Bytes received from the client, by the destination.")
	t.known = map[pair]*series{}
}

// open counts a connection in, and returns its series. It allocates only for the
// first one of a pair.
func (t *traffic) open(c *Connection) *series {
	p := pair{
		reporter: reporterOf(c.Direction),
		source:   c.Src.Workload, sourceNS: c.Src.Namespace, sourceID: c.Src.Identity,
		target: c.Dst.Workload, destNS: c.Dst.Namespace, destID: c.Dst.Identity,
		security: security(c),
	}
	if c.Src.Claimed { // a peer may claim any number of names
		p.source, p.sourceNS = "", ""
	}
	t.mu.RLock()
	s := t.known[p]
	if s != nil {
		s.live.Add(1)
	}
	t.mu.RUnlock()
	if s == nil {
		s = t.add(p, c.Start)
	}
	s.opened.Inc()
	s.used.Store(c.Start.UnixNano())
	return s
}

// add returns the series of a pair that had none, or that for the rest, with a
// connection more.
func (t *traffic) add(p pair, now time.Time) *series {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known[p] == nil && len(t.known) >= maxSeries {
		t.sweep(now)
		if len(t.known) >= maxSeries {
			p = p.other()
		}
	}
	s := t.known[p]
	if s == nil {
		values := p.values()
		s = &series{
			opened:   t.opened.WithLabelValues(values...),
			closed:   t.closed.WithLabelValues(values...),
			sent:     t.sent.WithLabelValues(values...),
			received: t.received.WithLabelValues(values...),
		}
		t.known[p] = s
	}
	s.live.Add(1)
	return s
}

// sweep drops some of the series of pairs that were not used lately. The caller
// holds mu.
func (t *traffic) sweep(now time.Time) {
	if now.Sub(t.swept) < sweepEvery {
		return
	}
	old := now.Add(-idleSeries).UnixNano()
	dropped := 0
	for p, s := range t.known {
		if p == p.other() || s.live.Load() > 0 || s.used.Load() > old {
			continue
		}
		delete(t.known, p)
		values := p.values()
		for _, v := range []*prometheus.CounterVec{t.opened, t.closed, t.sent, t.received} {
			v.DeleteLabelValues(values...)
		}
		if dropped++; dropped == sweepShare {
			return // the rest when there is no room again
		}
	}
	t.swept = now
}

// end counts a connection out that ended at a time.
func (s *series) end(at time.Time) {
	s.closed.Inc()
	s.used.Store(at.UnixNano())
	s.live.Add(-1)
}

// values are those of the labels.
func (p pair) values() []string {
	return []string{
		string(p.reporter),
		known(p.source), known(p.sourceNS), principal(p.sourceID),
		known(p.target), known(p.destNS), principal(p.destID),
		string(p.security),
	}
}

func known(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

func principal(id spiffeid.ID) string {
	if id.IsZero() {
		return "unknown"
	}
	return id.String()
}

// Flow is the handle by which one live connection counts its bytes. It belongs
// to one goroutine at a time. The zero Flow counts nothing.
type Flow struct {
	series               *series
	fromClient, toClient uint64 // counted so far
}

// Progress counts what has come since the last call. The arguments are totals
// since the connection began.
func (f *Flow) Progress(fromClient, toClient uint64) {
	if f.series == nil {
		return
	}
	if fromClient > f.fromClient {
		f.series.received.Add(float64(fromClient - f.fromClient))
		f.fromClient = fromClient
	}
	if toClient > f.toClient {
		f.series.sent.Add(float64(toClient - f.toClient))
		f.toClient = toClient
	}
}
