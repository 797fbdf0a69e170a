// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/pod"
)

// expiryWait bounds how long one scrape waits for certificates. Those of pods that
// are enrolled have been issued by then.
const expiryWait = 500 * time.Millisecond

// expiries says when the certificates of this node's pods end, when it is scraped:
// one series for each identity of a pod that is enrolled.
type expiries struct {
	pods         func() []pod.Status
	svid         func(context.Context, spiffeid.ID) (*identity.SVID, error)
	leaf, issuer *prometheus.Desc

	mu   sync.Mutex // guards last
	last map[spiffeid.ID]ends
}

// ends is when a certificate ends, and the one that has signed it.
type ends struct{ leaf, issuer time.Time }

func newExpiries(pods func() []pod.Status, svid func(context.Context, spiffeid.ID) (*identity.SVID, error)) *expiries {
	return &expiries{
		pods: pods, svid: svid,
		leaf: prometheus.NewDesc("certificate_expiration_seconds",
			"Time until the certificate of an enrolled pod's identity ends, in seconds; negative: it has ended. It is renewed at half its life.", []string{"identity"}, nil),
		issuer: prometheus.NewDesc("culvert_issuer_expiration_seconds",
			"Time until the first certificate ends of those that have signed this node's pods', in seconds: no leaf outlives it.", nil, nil),
	}
}

// Describe is prometheus.Collector's.
func (x *expiries) Describe(ch chan<- *prometheus.Desc) {
	ch <- x.leaf
	ch <- x.issuer
}

// Collect is prometheus.Collector's.
func (x *expiries) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), expiryWait)
	defer cancel()
	x.mu.Lock()
	defer x.mu.Unlock()
	now, known := time.Now(), map[spiffeid.ID]ends{}
	var first time.Time
	for _, s := range x.pods() {
		id := s.Pod.Identity()
		if _, again := known[id]; again || s.State != pod.Ready {
			continue
		}
		end, ok := x.last[id]
		// One that cannot be renewed is told as it was: that is when to look at it.
		if svid, err := x.svid(ctx, id); err == nil {
			end, ok = ends{leaf: svid.Leaf().NotAfter}, true
			for _, c := range svid.Certificates[1:] {
				if end.issuer.IsZero() || c.NotAfter.Before(end.issuer) {
					end.issuer = c.NotAfter
				}
			}
		}
		if !ok {
			continue
		}
		known[id] = end
		if !end.issuer.IsZero() && (first.IsZero() || end.issuer.Before(first)) {
			first = end.issuer
		}
		ch <- prometheus.MustNewConstMetric(x.leaf, prometheus.GaugeValue, end.leaf.Sub(now).Seconds(), id.String())
	}
	x.last = known
	if !first.IsZero() {
		ch <- prometheus.MustNewConstMetric(x.issuer, prometheus.GaugeValue, first.Sub(now).Seconds())
	}
}
