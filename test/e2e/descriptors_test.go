// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// A daemon without descriptors refuses new connections, in both directions, with
// reason limit; those that it has go on, and what an operator asks is answered.
// With descriptors again it serves by itself.
func TestDescriptors(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		const limit, many = 200, 260
		binary := wrapped(t, fmt.Sprintf("ulimit -n %d", limit))
		e := setup(t)
		one, two, late := e.Pod(1, 1), e.Pod(2, 1), e.Pod(2, 2)
		near, err := one.Echo(8080)
		e.must(err)
		far, err := two.Echo(8080)
		e.must(err)
		d := []*lab.Daemon{e.startOn(e.Nodes[0], lab.DaemonConfig{Binary: binary}), e.startOn(e.Nodes[1], lab.DaemonConfig{})}
		e.must(e.call(two, near.Addr(family))) // a session is there
		if n := e.sum(d[0], "culvert_connections_closed_total", "reason", "limit"); n != 0 {
			t.Errorf("control: %v ended by a limit before", n)
		}

		// Each is held, until there are no descriptors.
		var open []*net.TCPConn
		fill := func(from *lab.Pod, to *lab.App, tries, few int) {
			held, refused := 0, 0
			for range tries {
				c, err := e.dial(from, to.Addr(family))
				if err == nil {
					err = exchange(c, "x")
				}
				switch {
				case err == nil:
					open = append(open, c)
					held++
				case isReset(err) || isRefused(err):
					refused++
				default:
					t.Fatalf("from %s: %d are held, %d refused, then: %v", from.Name, held, refused, err)
				}
			}
			t.Logf("from %s: %d are held, %d were refused", from.Name, held, refused)
			if held < few || refused < 20 {
				t.Errorf("from %s: too few", from.Name)
			}
		}
		fill(one, far, many, 20) // captured
		fill(two, near, 100, 0)  // delivered: some sockets are in stock
		fill(late, near, 100, 0) // over a session that is to be accepted
		for i, c := range open {
			if err := exchange(c, "y"); err != nil {
				t.Fatalf("connection %d, which was there: %v", i, err)
			}
		}

		for _, want := range []struct{ labels, values []string }{
			{[]string{"reason", "limit", "reporter", "source"}, []string{"outbound", far.Addr(family).String()}},
			{[]string{"reason", "limit", "reporter", "destination"}, []string{"inbound", near.Addr(family).String()}},
		} {
			if n := e.sum(d[0], "culvert_connections_closed_total", want.labels...); n == 0 {
				t.Errorf("none is counted of %v", want.labels)
			}
			found, err := d[0].WaitAccessLog(e.ctx, 1, func(l lab.Entry) bool {
				return l.String("reason") == "limit" && l.String("direction") == want.values[0] && l.String("dst.addr") == want.values[1]
			})
			e.must(err)
			if detail := found[0].String("detail"); !strings.Contains(detail, "descriptors") {
				t.Errorf("detail: %s", detail)
			}
		}
		if n := e.sum(d[0], "culvert_peer_limits_total", "limit", "descriptors"); n == 0 {
			t.Error("none is counted")
		}
		if out := e.command(d[0], "status"); !strings.Contains(out, "ready") {
			t.Errorf("status: %s", out)
		}
		log, err := os.ReadFile(d[0].LogFile)
		e.must(err)
		if n := strings.Count(string(log), "out of descriptors"); n == 0 || n > 20 {
			t.Errorf("the log says %d times that there are none", n)
		}

		for _, c := range open {
			c.Close()
		}
		e.must(lab.Until(e.ctx, "it serves again", func() error {
			for _, way := range []struct {
				from *lab.Pod
				to   *lab.App
			}{{one, far}, {two, near}, {late, near}} {
				if err := e.call(way.from, way.to.Addr(family)); err != nil {
					return fmt.Errorf("from %s: %w", way.from.Name, err)
				}
			}
			return nil
		}))
	})
}
