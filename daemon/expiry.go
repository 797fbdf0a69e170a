// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/identity/ca"
	"github.com/culvert-mesh/culvert/pod"
)

// expiryWait bounds how long one scrape waits for certificates. Those of pods that
// are enrolled have been issued by then.
const expiryWait = 500 * time.Millisecond

// held is the SVID of a pod that is enrolled: one that is due is renewed, and one
// that cannot be is told as it was, since that is when to look at it. nil: there is
// none.
func held(ctx context.Context, issuer *ca.Authority, s pod.Status) *identity.SVID {
	if s.State != pod.Ready {
		return nil
	}
	id := s.Pod.Identity()
	if svid, err := issuer.SVID(ctx, id); err == nil {
		return svid
	}
	return issuer.Last(id)
}

// expiries says when the certificates of this node's pods end, when it is scraped:
// one series for each identity of a pod that is enrolled.
type expiries struct {
	pods         func() []pod.Status
	held         func(context.Context, pod.Status) *identity.SVID
	leaf, issuer *prometheus.Desc
}

func newExpiries(pods func() []pod.Status, held func(context.Context, pod.Status) *identity.SVID) expiries {
	return expiries{
		pods: pods, held: held,
		leaf: prometheus.NewDesc("certificate_expiration_seconds",
			"Time until the certificate of an enrolled pod's identity ends, in seconds; negative: it has ended. It is renewed at half its life.", []string{"identity"}, nil),
		issuer: prometheus.NewDesc("culvert_issuer_expiration_seconds",
			"Time until the first certificate ends of those that have signed this node's pods', in seconds: no leaf outlives it.", nil, nil),
	}
}

// Describe is prometheus.Collector's.
func (x expiries) Describe(ch chan<- *prometheus.Desc) {
	ch <- x.leaf
	ch <- x.issuer
}

// Collect is prometheus.Collector's.
func (x expiries) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), expiryWait)
	defer cancel()
	now, told := time.Now(), map[spiffeid.ID]bool{}
	var first time.Time
	for _, s := range x.pods() {
		svid := x.held(ctx, s)
		if svid == nil || told[svid.ID] {
			continue
		}
		told[svid.ID] = true
		for _, c := range svid.Certificates[1:] {
			if first.IsZero() || c.NotAfter.Before(first) {
				first = c.NotAfter
			}
		}
		ch <- prometheus.MustNewConstMetric(x.leaf, prometheus.GaugeValue, svid.Leaf().NotAfter.Sub(now).Seconds(), svid.ID.String())
	}
	if !first.IsZero() {
		ch <- prometheus.MustNewConstMetric(x.issuer, prometheus.GaugeValue, first.Sub(now).Seconds())
	}
}
