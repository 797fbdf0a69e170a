// SPDX-License-Identifier: Apache-2.0

// Package prometheus has a real Prometheus scrape two real daemons, and holds the
// metrics, the alert rules and the dashboard in deploy/prometheus against what it
// says of them. Needs root, and the programs prometheus and promtool.
package prometheus
