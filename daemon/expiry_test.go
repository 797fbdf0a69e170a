// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/x509"
	"math"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/identity/ca"
	"github.com/culvert-mesh/culvert/pod"
)

// There is a series for each identity of an enrolled pod.
func TestExpiries(t *testing.T) {
	one := func(name, account string, s pod.State) pod.Status {
		return pod.Status{Pod: pod.Pod{Name: name, Namespace: "demo", ServiceAccount: account, TrustDomain: "cluster.local"}, State: s}
	}
	pods := []pod.Status{one("a", "web", pod.Ready), one("b", "web", pod.Ready), one("c", "db", pod.Ready), one("d", "late", pod.Enrolling)}
	issued := map[string]time.Duration{"web": time.Hour, "db": 2 * time.Hour}
	x := newExpiries(func() []pod.Status { return pods }, func(_ context.Context, s pod.Status) *identity.SVID {
		life, ok := issued[s.Pod.ServiceAccount]
		if !ok {
			return nil
		}
		now := time.Now()
		return &identity.SVID{ID: s.Pod.Identity(), Certificates: []*x509.Certificate{{NotAfter: now.Add(life)}, {NotAfter: now.Add(10 * life)}}}
	})
	registry := prometheus.NewRegistry()
	registry.MustRegister(x)
	check := func(issuer time.Duration, want map[string]time.Duration) {
		t.Helper()
		all, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		near := func(got float64, want time.Duration) bool { return math.Abs(got-want.Seconds()) < 60 }
		issuers := 0
		for _, f := range all {
			for _, m := range f.Metric {
				got := m.GetGauge().GetValue()
				if f.GetName() == "culvert_issuer_expiration_seconds" {
					issuers++
					if !near(got, issuer) {
						t.Errorf("the issuer ends in %v s, want %s", got, issuer)
					}
					continue
				}
				id := m.Label[0].GetValue()
				if w, ok := want[id]; !ok || !near(got, w) {
					t.Errorf("%s ends in %v s, want %s", id, got, w)
				}
				delete(want, id)
			}
		}
		if (issuers == 1) != (issuer != 0) {
			t.Errorf("%d series of issuers", issuers)
		}
		for id := range want {
			t.Errorf("%s has none", id)
		}
	}
	const web, db = "spiffe://cluster.local/ns/demo/sa/web", "spiffe://cluster.local/ns/demo/sa/db"
	check(10*time.Hour, map[string]time.Duration{web: time.Hour, db: 2 * time.Hour})
	issued["web"] = -time.Hour // it could not be renewed
	check(-10*time.Hour, map[string]time.Duration{web: -time.Hour, db: 2 * time.Hour})
	pods = pods[2:]
	check(20*time.Hour, map[string]time.Duration{db: 2 * time.Hour})
	pods = nil
	check(0, nil)
}

// What a pod holds is told when it cannot be renewed, and has ended: that is when
// to look at it.
func TestHeldCertificateIsToldWhenItHasEnded(t *testing.T) {
	now := time.Now()
	issuer, err := ca.Open(t.Context(), ca.Config{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	s := pod.Status{Pod: pod.Pod{Name: "a", Namespace: "demo", ServiceAccount: "web", TrustDomain: "cluster.local"}, State: pod.Enrolling}
	if svid := held(t.Context(), issuer, s); svid != nil {
		t.Errorf("before it is enrolled it holds %v", svid)
	}
	s.State = pod.Ready
	first := held(t.Context(), issuer, s)
	if first == nil || first.ID != s.Pod.Identity() {
		t.Fatalf("it holds %v", first)
	}
	now = first.Leaf().NotAfter.Add(-time.Minute)
	second := held(t.Context(), issuer, s)
	if second == nil || !second.Leaf().NotAfter.After(first.Leaf().NotAfter) {
		t.Fatalf("renewed it holds %v", second)
	}
	now = second.Certificates[1].NotAfter.Add(time.Minute)
	if got := held(t.Context(), issuer, s); got != second {
		t.Errorf("once nothing can be issued it holds %v", got)
	}
	s.Pod.ServiceAccount = "late"
	if svid := held(t.Context(), issuer, s); svid != nil {
		t.Errorf("one that was never issued is %v", svid)
	}
}
