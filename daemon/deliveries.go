// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-mesh/culvert/tunnel"
)

// countDeliveries registers the tunnel's counters of odd deliveries.
func countDeliveries(r prometheus.Registerer, d *tunnel.Deliveries) {
	counter := func(name, help string, n *atomic.Uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(n.Load()) })
	}
	r.MustRegister(
		counter("culvert_delivery_retries_total",
			"Deliveries to applications that went unanswered for a second and were tried from another port.", &d.Again),
		counter("culvert_deliveries_to_marked_listeners_total",
			"Deliveries that timed out since the application's listener has a mark of its own (SO_MARK). The log names it.", &d.Marked),
	)
}
