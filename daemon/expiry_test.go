// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/x509"
	"errors"
	"math"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/pod"
)

// There is a series for each identity of an enrolled pod, and it goes on to tell
// when the certificate cannot be renewed.
func TestExpiries(t *testing.T) {
	one := func(name, account string, s pod.State) pod.Status {
		return pod.Status{Pod: pod.Pod{Name: name, Namespace: "demo", ServiceAccount: account, TrustDomain: "cluster.local"}, State: s}
	}
	pods := []pod.Status{one("a", "web", pod.Ready), one("b", "web", pod.Ready), one("c", "db", pod.Ready), one("d", "late", pod.Enrolling)}
	issued, failing := map[string]time.Duration{"web": time.Hour, "db": 2 * time.Hour, "late": time.Hour}, map[string]bool{}
	x := newExpiries(func() []pod.Status { return pods }, func(_ context.Context, id spiffeid.ID) (*identity.SVID, error) {
		account := id.Path()[len("/ns/demo/sa/"):]
		if failing[account] {
			return nil, errors.New("its intermediate has ended")
		}
		return &identity.SVID{Certificates: []*x509.Certificate{{NotAfter: time.Now().Add(issued[account])}, {NotAfter: time.Now().Add(10 * issued[account])}}}, nil
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
		for _, f := range all {
			for _, m := range f.Metric {
				got := m.GetGauge().GetValue()
				if f.GetName() == "culvert_issuer_expiration_seconds" {
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
		for id := range want {
			t.Errorf("%s has none", id)
		}
	}
	const web, db = "spiffe://cluster.local/ns/demo/sa/web", "spiffe://cluster.local/ns/demo/sa/db"
	check(10*time.Hour, map[string]time.Duration{web: time.Hour, db: 2 * time.Hour})
	issued["web"], failing["db"] = -time.Hour, true
	check(-10*time.Hour, map[string]time.Duration{web: -time.Hour, db: 2 * time.Hour})
	pods, issued["web"], failing["web"] = pods[:2], time.Hour, true // what it was
	check(-10*time.Hour, map[string]time.Duration{web: -time.Hour})
	pods = nil
	check(0, nil)
	if len(x.last) != 0 {
		t.Errorf("%d are remembered of no pods", len(x.last))
	}
}
