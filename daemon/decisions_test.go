// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/telemetry"
)

func newTestDecisionLog(t *testing.T) (*decisionLog, *[]telemetry.Connection) {
	t.Helper()
	f, _, _ := newFiles(t, "workloads:\n"+a+b)
	var lines []telemetry.Connection
	d := newDecisionLog(func(c *telemetry.Connection) { lines = append(lines, *c) }, f.store, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	d.add(pod.Pod{Name: "a", Namespace: "default", ServiceAccount: "a", TrustDomain: "cluster.local"})
	return d, &lines
}

func TestDecisionsHaveLines(t *testing.T) {
	d, lines := newTestDecisionLog(t)
	ours, theirs := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:4000")
	for name, want := range d.known {
		*lines = nil
		e := redirect.Event{Pod: "default_a", Decision: name, Src: ours, Dst: theirs, Time: time.Now()}
		if want.direction == policy.Inbound {
			e.Src, e.Dst = theirs, ours
		} else {
			e.Comm, e.UID = "cu\"rl", 7
		}
		d.take(e)
		if len(*lines) != 1 {
			t.Errorf("%s has %d lines", name, len(*lines))
			continue
		}
		c := (*lines)[0]
		pod, peer := c.Src, c.Dst
		if want.direction == policy.Inbound {
			pod, peer = peer, pod
		} else if !strings.Contains(c.Detail, `"cu\"rl" of user 7`) {
			t.Errorf("%s: detail %q", name, c.Detail)
		}
		if pod.Addr != ours || pod.Workload != "a" || pod.Identity.String() != "spiffe://cluster.local/ns/default/sa/a" {
			t.Errorf("%s: the pod is %+v", name, pod)
		}
		if peer.Addr != theirs || peer.Workload != "b" || !peer.Identity.IsZero() {
			t.Errorf("%s: the other is %+v", name, peer)
		}
		if c.Reason != want.reason || c.Reason == "" || c.Detail == "" {
			t.Errorf("%s: %s, %s", name, c.Reason, c.Detail)
		}
		if (c.Reason == telemetry.ReasonOK) != (c.Event == telemetry.Passed) || (c.Reason != telemetry.ReasonOK) != (c.Event == telemetry.Refused) {
			t.Errorf("%s: %s is said to be %s", name, c.Reason, c.Event)
		}
	}
	*lines = nil
	d.take(redirect.Event{Pod: "default_a", Decision: "option_refused"})
	d.take(redirect.Event{Pod: "default_a", Decision: "of a later version"})
	if len(*lines) != 0 {
		t.Errorf("lines of others: %v", *lines)
	}
}

// Each decision that has an event has a line here, or is meant to have none.
func TestDecisionsAreThoseOfThePrograms(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "bpf", "culvert.h"))
	if err != nil {
		t.Fatal(err)
	}
	source := string(b)
	for name := range loggedDecisions() {
		if !strings.Contains(source, "DECISION_"+strings.ToUpper(name)) {
			t.Errorf("the programs know no decision %s", name)
		}
	}
}

// A pod that tries in a loop takes no line from another, nor from another
// decision; the next line says how many there were.
func TestDecisionsAreBounded(t *testing.T) {
	d, lines := newTestDecisionLog(t)
	now := time.Now()
	flood := func(pod, decision string, n int) {
		for range n {
			d.take(redirect.Event{Pod: pod, Decision: decision, Time: now})
		}
	}
	count := func(what string, want int) {
		t.Helper()
		if len(*lines) != want {
			t.Errorf("%s: %d lines, want %d", what, len(*lines), want)
		}
	}
	flood("default_a", "strict_refused", 1000)
	count("a flood", decisionLines)
	flood("default_a", "connect_refused_unknown", 1)
	flood("default_b", "strict_refused", 1)
	count("beside it", decisionLines+2)
	if n := testutil.ToFloat64(d.suppressed.WithLabelValues("strict_refused")); n != 1000-decisionLines {
		t.Errorf("%v are counted as having no line", n)
	}
	now = now.Add(100 * time.Millisecond)
	flood("default_a", "strict_refused", 5)
	count("a tenth of a second later", decisionLines+3)
	if c := (*lines)[decisionLines+2]; !strings.HasSuffix(c.Detail, "; 990 more like it have no line") {
		t.Errorf("the next line says: %s", c.Detail)
	}
	now = now.Add(time.Hour)
	flood("default_a", "strict_refused", 1000)
	count("an hour later", 2*decisionLines+3)

	for i := range 2 * decisionBuckets {
		flood(fmt.Sprint("pod", i), "strict_refused", 1)
	}
	if n := len(d.buckets); n > decisionBuckets {
		t.Errorf("%d buckets are kept", n)
	}
}

func TestDecisionLogGoesOnPastAnError(t *testing.T) {
	d, _ := newTestDecisionLog(t)
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	d.run(ctx, func(context.Context, func(redirect.Event)) error {
		calls++
		cancel()
		return errors.New("no ring")
	})
	if calls != 1 {
		t.Errorf("%d calls", calls)
	}
}
