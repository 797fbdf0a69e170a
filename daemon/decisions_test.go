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

// The first plaintext that a pod refuses is warned of, once for each pod, and with
// an entry that can be copied into the policy file and does what it says.
func TestFirstStrictRefusalIsWarnedOf(t *testing.T) {
	d, _ := newTestDecisionLog(t)
	var said strings.Builder
	d.log = slog.New(slog.NewTextHandler(&said, nil))
	knock := func(pod string) {
		d.take(redirect.Event{Pod: pod, Decision: "strict_refused", Src: netip.MustParseAddrPort("10.0.0.9:4000"), Dst: netip.MustParseAddrPort("10.0.0.1:8080"), Time: time.Now()})
	}
	d.take(redirect.Event{Pod: "default_a", Decision: "connect_refused_unknown"})
	knock("default_nobody")
	if said.Len() > 0 {
		t.Errorf("said of something else: %s", &said)
	}
	for range 3 {
		knock("default_a")
	}
	line := said.String()
	if strings.Count(line, "\n") != 1 || !strings.Contains(line, "level=WARN") || !strings.Contains(line, "src=10.0.0.9:4000 dst=10.0.0.1:8080") {
		t.Fatalf("said of three: %s", line)
	}
	_, entry, _ := strings.Cut(line, "modes: ")
	entry, _, _ = strings.Cut(entry, "; a health probe")
	f, err := policy.ParseFile("policy.yaml", []byte("modes: "+entry+"\n"))
	if err != nil {
		t.Fatalf("%v in %s", err, entry)
	}
	strict := policy.DefaultMode(policy.Mode("strict"))
	for port, want := range map[uint16]policy.Mode{8080: "permissive", 8081: "strict"} {
		if got, _ := policy.NewSet(nil, append(f.Modes, strict)...).Mode("default", "a", port); got != want {
			t.Errorf("with the entry, port %d is %s", port, got)
		}
	}

	p := d.pods["default_a"]
	d.remove(p)
	d.add(p)
	knock("default_a")
	if n := strings.Count(said.String(), "\n"); n != 2 {
		t.Errorf("%d lines once it is enrolled anew:\n%s", n, &said)
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
