// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"net/http"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"

	"github.com/culvert-mesh/culvert/identity"
)

// MetricsConfig names what metrics are read from. Every field may be zero.
type MetricsConfig struct {
	Version string // of this build; empty: unknown
	// Decisions returns the totals of the connect hooks and of sk_lookup by
	// name. Called at each scrape. nil: that metric is absent.
	Decisions func() map[string]uint64
	// AccessLog has its lines counted. nil: those metrics are absent.
	AccessLog *AccessLog
	// Log has the lines counted that it drops. nil: that metric is absent.
	Log *Spool
}

// Metrics owns the registry of a daemon and the counters of its traffic. Its
// methods are safe for concurrent use, and cheap: a counter is one atomic
// addition once its series is known.
type Metrics struct {
	registry *prometheus.Registry

	handshakes        prometheus.Counter
	handshakeFailures *prometheus.CounterVec
	handshakeSeconds  prometheus.Histogram

	closed   map[closedKey]prometheus.Counter // never changes
	unlisted map[Reporter]prometheus.Counter  // reasons that are not on the list

	traffic traffic
}

type closedKey struct {
	reporter Reporter
	reason   Reason
}

// NewMetrics registers everything. The registry is the caller's own, so that
// two daemons in one process do not meet.
func NewMetrics(c MetricsConfig) *Metrics {
	r := prometheus.NewRegistry()
	m := &Metrics{
		registry: r,
		handshakes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "mtls_handshake_success_total",
			Help: "TLS handshakes between nodes that succeeded, at either side.",
		}),
		handshakeFailures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mtls_handshake_failure_total",
			Help: "TLS handshakes between nodes that failed, by the first check that did.",
		}, []string{"reason", "reporter"}),
		handshakeSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "mtls_handshake_duration_seconds",
			Help: "Time that successful TLS handshakes between nodes took, in seconds.",
			// A handshake is about 1 ms of CPU at each end, and a round trip.
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10},
		}),
		closed:   map[closedKey]prometheus.Counter{},
		unlisted: map[Reporter]prometheus.Counter{},
	}
	closed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "culvert_connections_closed_total",
		Help: "Connections of applications that have ended, by how they did. Those refused are among them.",
	}, []string{"reporter", "reason"})
	for _, reporter := range reporters() {
		for _, reason := range Reasons() {
			m.closed[closedKey{reporter, reason}] = closed.WithLabelValues(string(reporter), string(reason))
		}
		m.unlisted[reporter] = closed.WithLabelValues(string(reporter), "unlisted")
	}
	// Every series of a closed list is there from the start: an alert on the
	// first failure needs the zero before it.
	for _, reporter := range reporters() {
		for _, reason := range identity.Reasons() {
			m.handshakeFailures.WithLabelValues(string(reason), string(reporter))
		}
	}
	m.traffic.init(r)

	version := c.Version
	if version == "" {
		version = "unknown"
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "culvert_build_info",
		Help:        "Always 1; the labels say which build this is.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	build.Set(1)
	r.MustRegister(
		m.handshakes, m.handshakeFailures, m.handshakeSeconds, closed, build,
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	if c.Decisions != nil {
		r.MustRegister(decisions{c.Decisions, prometheus.NewDesc(
			"culvert_redirect_decisions_total",
			"What the redirection in the kernel did with connections, by decision.",
			[]string{"decision"}, nil,
		)})
	}
	if l := c.AccessLog; l != nil {
		r.MustRegister(
			prometheus.NewCounterFunc(prometheus.CounterOpts{
				Name: "culvert_access_log_lines_total",
				Help: "Lines of the access log that were written.",
			}, func() float64 { return float64(l.Written()) }),
			prometheus.NewCounterFunc(prometheus.CounterOpts{
				Name: "culvert_access_log_dropped_total",
				Help: "Lines of the access log that were lost, since their reader was too slow or gone, or the disk full.",
			}, func() float64 { return float64(l.Dropped()) }),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "culvert_access_log_waiting_lines",
				Help: "Lines of the access log that wait for their reader now. Beyond accessLog.queue they are dropped.",
			}, func() float64 { return float64(l.Waiting()) }),
		)
	}
	if s := c.Log; s != nil {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "culvert_log_dropped_total",
			Help: "Lines of ztunnel's own log that were lost, since their reader was too slow or gone, or the disk full.",
		}, func() float64 { return float64(s.Dropped()) }))
	}
	return m
}

// Registry is for parts that own counters of their own.
func (m *Metrics) Registry() *prometheus.Registry { return m.registry }

// Handler serves the metrics in the formats of Prometheus. Before each scrape it
// calls first, which brings counters up to date; nil: they are.
func (m *Metrics) Handler(first func()) http.Handler {
	gather := prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		if first != nil {
			first()
		}
		return m.registry.Gather()
	})
	return promhttp.HandlerFor(gather, promhttp.HandlerOpts{
		// One scrape in flight and one behind it: the endpoint is no way to
		// keep the node busy.
		MaxRequestsInFlight: 2,
		EnableOpenMetrics:   true,
	})
}

// Handshake counts a handshake.
func (m *Metrics) Handshake(h Handshake) {
	if h.Reason != "" {
		m.handshakeFailures.WithLabelValues(h.Reason, string(h.Reporter)).Inc()
		return
	}
	m.handshakes.Inc()
	m.handshakeSeconds.Observe(h.Duration.Seconds())
}

// Opened counts a connection that was accepted and let through, and returns the
// handle of its series.
func (m *Metrics) Opened(c *Connection) Flow {
	return Flow{series: m.traffic.open(c)}
}

// Closed counts a connection that has ended. f is what Opened returned; nil or
// zero for a connection that was refused and never opened.
func (m *Metrics) Closed(f *Flow, c *Connection) {
	reporter := reporterOf(c.Direction)
	if counter, ok := m.closed[closedKey{reporter, c.Reason}]; ok {
		counter.Inc()
	} else {
		m.unlisted[reporter].Inc()
	}
	if f != nil && f.series != nil {
		f.Progress(c.FromClient, c.ToClient)
		f.series.end(c.Start.Add(c.Duration))
		f.series = nil
	}
}

// decisions reads its counters when it is scraped.
type decisions struct {
	read func() map[string]uint64
	desc *prometheus.Desc
}

func (d decisions) Describe(ch chan<- *prometheus.Desc) { ch <- d.desc }

func (d decisions) Collect(ch chan<- prometheus.Metric) {
	for name, n := range d.read() {
		ch <- prometheus.MustNewConstMetric(d.desc, prometheus.CounterValue, float64(n), name)
	}
}
