// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// watch holds the handshakes that a daemon reports from now on.
type watch struct {
	e      *env
	d      *lab.Daemon
	before lab.Metrics
	log    int // bytes of its log
	access int // lines of its access log
}

func (e *env) watch(d *lab.Daemon) *watch {
	e.t.Helper()
	m, err := d.Metrics(e.ctx)
	e.must(err)
	log, err := os.ReadFile(d.LogFile)
	e.must(err)
	access, err := d.AccessLog()
	e.must(err)
	return &watch{e: e, d: d, before: m, log: len(log), access: len(access)}
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
	var line string
	err := lab.Until(w.e.ctx, fmt.Sprintf("%s reports %s", w.d.Node.Name, reason), func() error {
		all, err := os.ReadFile(w.d.LogFile)
		if err != nil {
			return err
		}
		for l := range strings.Lines(string(all[w.log:])) {
			if strings.Contains(l, `msg="handshake failed"`) && strings.HasSuffix(l, "\n") { // else it is being written
				line = l
				return nil
			}
		}
		return errors.New("no handshake failed, by its log")
	}, w.soon())
	if err != nil {
		t.Error(err)
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

// soon ends a wait.
func (w *watch) soon() func() error {
	end := time.Now().Add(patience())
	return func() error {
		if time.Now().After(end) {
			return errors.New("out of patience")
		}
		return nil
	}
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
	}, w.soon())
	if err != nil {
		t.Error(err)
	}
}

// closed waits for the line of the access log of a connection to dst.
func (w *watch) closed(direction string, dst netip.AddrPort) lab.Entry {
	t := w.e.t
	t.Helper()
	var found lab.Entry
	err := lab.Until(w.e.ctx, "the connection is in the access log", func() error {
		all, err := w.d.AccessLog()
		if err != nil {
			return err
		}
		for _, l := range all[w.access:] {
			if l.String("direction") == direction && l.String("dst.addr") == dst.String() {
				found = l
				return nil
			}
		}
		return fmt.Errorf("%d lines, none for %s", len(all)-w.access, dst)
	}, w.soon())
	if err != nil {
		t.Fatal(err)
	}
	return found
}
