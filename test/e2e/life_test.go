// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
)

func TestStrict(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		wire := e.capture(capture.Config{NS: e.Nodes[1].NS, Interface: e.Pod(2, 1).HostEnd(), Markers: []string{marker}})
		start := time.Now()
		_, err = e.dial(e.Pod(1, 3), app.Addr(family)) // plaintext, from outside the mesh
		if took := time.Since(start); took > atOnce() || !isRefused(err) {
			t.Errorf("plaintext to a STRICT workload: %v after %v, want a refusal within %v", err, took, atOnce())
		}
		if len(app.Peers()) != 0 {
			t.Error("the application was reached")
		}
		if n, _ := wire.Payload(nil); n != 0 {
			t.Errorf("%d segments with payload", n)
		}
		if n, _ := wire.Count(func(s capture.Segment) bool { return s.Has(capture.SYN | capture.ACK) }); n != 0 {
			t.Errorf("%d handshakes were answered", n)
		}
		if n := e.sum(d[1], "culvert_redirect_decisions_total", "decision", "strict_refused"); n == 0 {
			t.Error("the refusal was not counted")
		}
		plain, err := e.Pod(2, 3).Echo(8080) // the control: not enrolled
		e.must(err)
		e.must(exchange(e.connect(e.Pod(1, 3), plain.Addr(family)), marker))
	})
}

func TestKilledDaemon(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		held := e.connect(e.Pod(1, 1), app.Addr(family))
		e.must(exchange(held, "before"))
		wire := e.wire(marker)
		d[0].Kill() // kill -9, idle

		// What was carried is reset, and does not look complete.
		if _, err := io.ReadAll(held); !isReset(err) {
			t.Errorf("an established connection ended with %v, want a reset", err)
		}
		// What is new is refused, at once.
		start := time.Now()
		_, err = e.dial(e.Pod(1, 1), app.Addr(family))
		if took := time.Since(start); !isRefused(err) || took > atOnce() {
			t.Errorf("connect without a daemon: %v after %v, want it refused within %v", err, took, atOnce())
		}
		// And so is what comes in, on the tunnel's port and on the application's.
		for _, port := range []uint16{hbonePort, 8080} {
			_, err = e.dial(e.Pod(1, 3), netip.AddrPortFrom(e.Pod(1, 1).Addr(family), port))
			if !isRefused(err) {
				t.Errorf("connect to port %d of a pod without a daemon: %v, want it refused", port, err)
			}
		}
		if n := outside(wire); n != 0 || wire.Seen(0) != 0 {
			t.Errorf("%d payload-bearing segments in plaintext", n)
		}

		// The pins are taken over, and the pod is served again.
		e.startOn(e.Nodes[0], lab.DaemonConfig{})
		e.carried(e.Pod(1, 1), app.Addr(family))
	})
}

func TestCleanup(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 3).Echo(8080)
	e.must(err)
	if out, err := d[0].Cleanup(e.ctx); err == nil {
		t.Errorf("cleanup beside a running daemon went through: %s", out)
	}
	e.must(d[0].Stop(e.ctx))
	before := e.Nodes[0].State(e.Pod(1, 1))
	if before == "" {
		t.Error("control: nothing is found in an enrolled pod")
	}
	out, err := d[0].Cleanup(e.ctx)
	e.must(err)
	if out == "" {
		t.Error("cleanup does not say what it removed")
	}
	if left := e.Nodes[0].State(e.Pod(1, 1)); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	// Released: as without the mesh.
	wire := e.wire(marker)
	e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(4)), marker))
	if wire.Seen(0) == 0 {
		t.Error("the released pod's traffic is not on the wire")
	}
}

func TestSecondDaemonRefuses(t *testing.T) {
	e, _ := mesh(t)
	d, err := e.Nodes[0].LaunchDaemon(lab.DaemonConfig{Binary: ztunnel, Workloads: e.enrolled(), Pods: e.Nodes[0].Pods[:2], Settings: map[string]any{"metrics": map[string]any{"address": "127.0.0.1:15030"}}})
	e.must(err)
	if err := d.Wait(e.ctx); err == nil {
		t.Error("a second daemon on the same run directory ran")
	}
}
