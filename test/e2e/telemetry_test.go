// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// The bytes of a connection that is open are counted when the daemons are scraped,
// at both ends, and once.
func TestBytesAreCountedMeanwhile(t *testing.T) {
	e := setup(t)
	d := e.start(lab.DaemonConfig{Settings: map[string]any{"mode": "permissive"}})
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	for name, tt := range map[string]struct {
		from      *lab.Pod
		security  string
		reporters map[string]*lab.Daemon
	}{
		"mutual TLS": {e.Pod(1, 1), "mutual_tls", map[string]*lab.Daemon{"source": d[0], "destination": d[1]}},
		"plaintext":  {e.Pod(1, 3), "none", map[string]*lab.Daemon{"destination": d[1]}},
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			wants := func(when string, bytes int, closed float64) {
				t.Helper()
				for reporter, d := range tt.reporters {
					labels := []string{"reporter", reporter, "connection_security_policy", tt.security}
					for metric, want := range map[string]float64{
						"istio_tcp_received_bytes_total": float64(bytes), "istio_tcp_sent_bytes_total": float64(bytes),
						"istio_tcp_connections_closed_total": closed,
					} {
						e.must(lab.Until(e.ctx, when, func() error { return is(e.sum(d, metric, labels...), want, metric+" of the "+reporter) }))
					}
				}
			}
			const size = 100_000
			text := strings.Repeat("culvert!", size/8)
			c := e.connect(tt.from, app.Addr(4))
			wants("nothing has moved", 0, 0) // the control
			e.must(exchange(c, text))
			wants("it is open", size, 0)
			e.must(exchange(c, text))
			wants("it is open still", 2*size, 0)
			e.must(c.CloseWrite())
			wants("it has ended", 2*size, 1)
		})
	}
}

// is wants a number to be another.
func is(got, want float64, what string) error {
	if got != want {
		return fmt.Errorf("%s is %v, want %v", what, got, want)
	}
	return nil
}
