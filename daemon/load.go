// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-mesh/culvert/tunnel"
)

// loads reads what the event loops have, and have done, when it is scraped.
type loads struct {
	tunnel                            *tunnel.Tunnel
	turns, cpu, sessions, connections *prometheus.Desc
}

func newLoads(t *tunnel.Tunnel) loads {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, append([]string{"loop"}, labels...), nil)
	}
	return loads{
		tunnel:      t,
		turns:       desc("culvert_loop_turns_total", "Turns of an event loop: how often it has woken and done what was there."),
		cpu:         desc("culvert_loop_cpu_seconds_total", "CPU time that the thread of an event loop has used, in seconds. A loop that nears 1 a second is the bottleneck."),
		sessions:    desc("culvert_sessions", "Tunnel connections that are open on an event loop, by this node's role in them.", "role"),
		connections: desc("culvert_open_connections", "Connections of applications on an event loop, those that are being made among them: outbound and inbound ones are streams of sessions, plaintext ones are not.", "kind"),
	}
}

// Describe is prometheus.Collector's.
func (l loads) Describe(ch chan<- *prometheus.Desc) {
	ch <- l.turns
	ch <- l.cpu
	ch <- l.sessions
	ch <- l.connections
}

// Collect is prometheus.Collector's.
func (l loads) Collect(ch chan<- prometheus.Metric) {
	for i, n := range l.tunnel.Loads() {
		loop := strconv.Itoa(i)
		counter := func(d *prometheus.Desc, v float64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, loop)
		}
		gauge := func(d *prometheus.Desc, v int64, of string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), loop, of)
		}
		counter(l.turns, float64(n.Turns))
		counter(l.cpu, n.CPU.Seconds())
		gauge(l.sessions, n.ClientSessions, "client")
		gauge(l.sessions, n.ServerSessions, "server")
		gauge(l.connections, n.Outbound, "outbound")
		gauge(l.connections, n.Inbound, "inbound")
		gauge(l.connections, n.Plaintext, "plaintext")
	}
}
