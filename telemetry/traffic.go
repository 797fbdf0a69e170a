// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxSeries bounds the pairs of workloads that are counted apart (about 5 KiB
// each); pairs beyond it are counted together, as workload "other".
const maxSeries = 8192

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
}

// traffic finds series. A series, once made, stays.
type traffic struct {
	opened, closed, sent, received *prometheus.CounterVec

	mu    sync.RWMutex
	known map[pair]*series // guarded by mu
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

// find returns the series of a connection. It allocates only the first time.
func (t *traffic) find(c *Connection) *series {
	p := pair{
		reporter: ReporterOf(c.Direction),
		source:   c.Src.Workload, sourceNS: c.Src.Namespace, sourceID: c.Src.Identity,
		target: c.Dst.Workload, destNS: c.Dst.Namespace, destID: c.Dst.Identity,
		security: security(c),
	}
	if c.Src.Claimed { // a peer may claim any number of names
		p.source, p.sourceNS = "", ""
	}
	t.mu.RLock()
	s := t.known[p]
	if s == nil && len(t.known) >= maxSeries {
		p = p.other()
		s = t.known[p]
	}
	t.mu.RUnlock()
	if s != nil {
		return s
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.known[p]; s != nil {
		return s
	}
	values := []string{
		string(p.reporter),
		known(p.source), known(p.sourceNS), principal(p.sourceID),
		known(p.target), known(p.destNS), principal(p.destID),
		string(p.security),
	}
	s = &series{
		opened:   t.opened.WithLabelValues(values...),
		closed:   t.closed.WithLabelValues(values...),
		sent:     t.sent.WithLabelValues(values...),
		received: t.received.WithLabelValues(values...),
	}
	t.known[p] = s
	return s
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
