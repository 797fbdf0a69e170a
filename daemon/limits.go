// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-mesh/culvert/tunnel"
)

// peerLimits reads the tunnel's bounds on peers when it is scraped.
type peerLimits struct {
	tunnel       *tunnel.Tunnel
	met          *prometheus.Desc
	memory, size *prometheus.Desc
	unsaid       *prometheus.Desc
}

func newPeerLimits(t *tunnel.Tunnel) peerLimits {
	return peerLimits{
		tunnel: t,
		met: prometheus.NewDesc("culvert_peer_limits_total",
			"How often a bound on peers was met: what was refused, reset or closed for it.", []string{"limit"}, nil),
		memory: prometheus.NewDesc("culvert_peer_memory_bytes",
			"Memory that peers make the node use, in bytes: queued for applications that do not take it, and what sessions and streams that peers hold open are charged at.", []string{"use"}, nil),
		size: prometheus.NewDesc("culvert_peer_memory_limit_bytes",
			"What both uses of culvert_peer_memory_bytes may be together, in bytes; each may be half of it.", nil, nil),
		unsaid: prometheus.NewDesc("culvert_log_suppressed_total",
			"Lines that ztunnel's own log lacks since peers had caused too many of a kind in a second, by what they are about.", []string{"about"}, nil),
	}
}

// Describe is prometheus.Collector's.
func (p peerLimits) Describe(ch chan<- *prometheus.Desc) {
	ch <- p.met
	ch <- p.memory
	ch <- p.size
	ch <- p.unsaid
}

// Collect is prometheus.Collector's.
func (p peerLimits) Collect(ch chan<- prometheus.Metric) {
	for name, n := range p.tunnel.Limits() {
		ch <- prometheus.MustNewConstMetric(p.met, prometheus.CounterValue, float64(n), name)
	}
	for about, n := range p.tunnel.Unsaid() {
		ch <- prometheus.MustNewConstMetric(p.unsaid, prometheus.CounterValue, float64(n), about)
	}
	queued, open, size := p.tunnel.Memory()
	ch <- prometheus.MustNewConstMetric(p.memory, prometheus.GaugeValue, float64(queued), "queued")
	ch <- prometheus.MustNewConstMetric(p.memory, prometheus.GaugeValue, float64(open), "open")
	ch <- prometheus.MustNewConstMetric(p.size, prometheus.GaugeValue, float64(size))
}
