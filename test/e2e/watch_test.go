// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// watch holds what a daemon logs and counts from now on.
type watch struct {
	*lab.Watch
	e      *env
	d      *lab.Daemon
	before lab.Metrics
}

func (e *env) watch(d *lab.Daemon) *watch {
	e.t.Helper()
	m, err := d.Metrics(e.ctx)
	e.must(err)
	w, err := d.Watch()
	e.must(err)
	return &watch{w, e, d, m}
}

const (
	failures  = "mtls_handshake_failure_total"
	successes = "mtls_handshake_success_total"
)

// failed wants one handshake to have failed, for this reason, in the log and in
// the metric, and nothing else to have been counted.
func (w *watch) failed(reporter string, reason identity.Reason, detail string) {
	t := w.e.t
	t.Helper()
	line, err := w.HandshakeFailed(w.e.ctx, lab.Within(patience()))
	if err != nil {
		t.Errorf("of %s: %v", reason, err)
		return
	}
	wants := []string{"reporter=" + reporter + " ", "reason=" + string(reason) + " ", "peer=", detail}
	if reporter == "source" {
		wants = append(wants, "expected=spiffe://") // whom it has called
	}
	if reason == identity.ReasonIdentityMismatch || reason == identity.ReasonChainValidationFailed {
		wants = append(wants, "claimed=spiffe://")
	}
	for _, want := range wants {
		if !strings.Contains(line, want) {
			t.Errorf("%s logs %q, want %q in it", w.d.Node.Name, line, want)
		}
	}
	w.counted(1, 0, reporter, reason)
}

// counted wants the metric of a reason to have risen by failed, the one of success
// by succeeded, and no other.
func (w *watch) counted(failed, succeeded float64, reporter string, reason identity.Reason) {
	t := w.e.t
	t.Helper()
	err := lab.Until(w.e.ctx, "the metrics are as wanted", func() error {
		m, err := w.d.Metrics(w.e.ctx)
		if err != nil {
			return err
		}
		risen := func(name string, labels ...string) float64 {
			return m.Sum(name, labels...) - w.before.Sum(name, labels...)
		}
		this, all, good := risen(failures, "reporter", reporter, "reason", string(reason)), risen(failures), risen(successes)
		if this != failed || all != failed || good != succeeded {
			return fmt.Errorf("%s counts %v of reason %q by the %s, %v failures in all, %v successes", w.d.Node.Name, this, reason, reporter, all, good)
		}
		return nil
	}, lab.Within(patience()))
	if err != nil {
		t.Error(err)
	}
}

// closed waits for the line of the access log of a connection to dst.
func (w *watch) closed(direction string, dst netip.AddrPort) lab.Entry {
	w.e.t.Helper()
	l, err := w.Closed(w.e.ctx, direction, dst, lab.Within(patience()))
	w.e.must(err)
	return l
}
