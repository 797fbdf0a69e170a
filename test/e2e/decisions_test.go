// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// wants compares fields of a line of the access log; "": it has none.
func wants(t *testing.T, l lab.Entry, fields map[string]string) {
	t.Helper()
	for name, want := range fields {
		if got := l.String(name); got != want {
			t.Errorf("%s is %q, want %q, in %v", name, got, want, l)
		}
	}
}

// unowned is an address of the pods' ranges that no workload has.
func unowned(family int) netip.AddrPort {
	if family == 6 {
		return netip.MustParseAddrPort("[fd77::2:99]:8080")
	}
	return netip.MustParseAddrPort("10.77.2.99:8080")
}

// A call that connect() itself refuses is in the access log.
func TestRefusedConnectIsLogged(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		one, dst := e.Pod(1, 1), unowned(family)
		if err := e.try(one, dst); !isRefused(err) {
			t.Errorf("%v, want it refused", err)
		}
		l := e.line(d[0], "outbound", dst)
		wants(t, l, map[string]string{
			"src.workload": one.Name, "src.namespace": one.Namespace, "src.identity": one.Identity(),
			"dst.workload": "", "dst.identity": "", "reason": "unknown_destination", "connection_security_policy": "unknown", "level": "error",
			"message": "connection refused", "src.addr": one.Addr(family).String(), // connect() knows no port yet
		})
		if detail := l.String("detail"); !strings.Contains(detail, "mesh.cidrs") || !strings.Contains(detail, "process ") {
			t.Errorf("detail: %s", detail)
		}
		// The control: what is carried has its usual line, and no other.
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		e.must(e.call(one, app.Addr(family)))
		wants(t, e.line(d[0], "outbound", app.Addr(family)), map[string]string{"message": "connection complete", "reason": "ok", "connection_security_policy": "mutual_tls", "dst.identity": e.Pod(2, 1).Identity()})
	})
}

// A connection to a workload that says tcp is in the access log, without a peer
// identity.
func TestPlainIsLogged(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e := setup(t)
		one, three := e.Pod(1, 1), e.Pod(2, 3)
		plain := three.Workload()
		plain.Protocol = "tcp"
		d := e.start(lab.DaemonConfig{Workloads: append(e.enrolled(), plain)})
		app, err := three.Echo(8080)
		e.must(err)
		e.must(e.call(one, app.Addr(family)))
		l := e.line(d[0], "outbound", app.Addr(family))
		wants(t, l, map[string]string{
			"src.workload": one.Name, "src.identity": one.Identity(), "dst.workload": three.Name, "dst.identity": "",
			"connection_security_policy": "none", "reason": "ok", "tls.version": "", "message": "connection passed",
		})
		if !strings.Contains(l.String("detail"), "in plaintext") {
			t.Errorf("detail: %s", l.String("detail"))
		}
		// The control: as hbone it has one.
		hbone, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		e.must(e.call(one, hbone.Addr(family)))
		wants(t, e.line(d[0], "outbound", hbone.Addr(family)), map[string]string{"dst.identity": e.Pod(2, 1).Identity(), "connection_security_policy": "mutual_tls", "tls.version": "1.3"})
	})
}

// Plaintext that STRICT turns away is in the access log of the destination's node,
// with the mend; a flood of it is bounded, and takes no line from another pod.
func TestStrictRefusalIsLogged(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		two, other, stranger := e.Pod(2, 1), e.Pod(2, 2), e.Pod(1, 3) // not enrolled, nor a workload
		app, err := two.Echo(8080)
		e.must(err)
		if err := e.try(stranger, app.Addr(family)); !isRefused(err) {
			t.Errorf("%v, want it refused", err)
		}
		l := e.line(d[1], "inbound", app.Addr(family))
		wants(t, l, map[string]string{
			"dst.workload": two.Name, "dst.namespace": two.Namespace, "dst.identity": two.Identity(),
			"src.workload": "", "src.identity": "", "reason": "denied", "connection_security_policy": "unknown", "message": "connection refused",
		})
		if src := netip.MustParseAddrPort(l.String("src.addr")); src.Addr() != stranger.Addr(family) || src.Port() == 0 {
			t.Errorf("src.addr is %s", src)
		}
		if detail := l.String("detail"); !strings.Contains(detail, "plaintext") || !strings.Contains(detail, "enrol its client") {
			t.Errorf("detail: %s", detail)
		}
		// The control: from an enrolled pod the same is served, and logged as such.
		e.must(e.call(e.Pod(1, 1), app.Addr(family)))
		e.must(lab.Until(e.ctx, "the carried connection is logged", func() error {
			all, err := d[1].AccessLog()
			if err != nil {
				return err
			}
			for _, l := range all {
				if l.String("direction") == "inbound" && l.String("reason") == "ok" && l.String("src.identity") == e.Pod(1, 1).Identity() {
					return nil
				}
			}
			return fmt.Errorf("%d lines", len(all))
		}))

		const flood = 400
		var wait sync.WaitGroup
		for range 4 {
			wait.Go(func() {
				for range flood / 4 {
					_ = e.try(stranger, app.Addr(family))
				}
			})
		}
		wait.Wait()
		quiet := netip.AddrPortFrom(other.Addr(family), 9090)
		if err := e.try(stranger, quiet); !isRefused(err) {
			t.Errorf("%v, want it refused", err)
		}
		e.line(d[1], "inbound", quiet)
		e.must(lab.Until(e.ctx, "what has no line is counted", func() error {
			all, err := d[1].AccessLog()
			if err != nil {
				return err
			}
			lines := 0
			for _, l := range all {
				if l.String("reason") == "denied" && l.String("dst.addr") == app.Addr(family).String() {
					lines++
				}
			}
			if n := int(e.sum(d[1], "culvert_access_log_suppressed_total", "decision", "strict_refused")); lines == 0 || n == 0 || lines+n != flood+1 {
				return fmt.Errorf("%d lines, and %d without, of %d", lines, n, flood+1)
			}
			return nil
		}))
	})
}
