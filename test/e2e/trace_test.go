// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"io"
	"net/netip"
	"testing"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// whole connects from a pod, exchanges the marker, and ends cleanly.
func (e *env) whole(from *lab.Pod, to netip.AddrPort) {
	e.t.Helper()
	c := e.connect(from, to)
	e.must(exchange(c, marker))
	e.must(c.CloseWrite())
	_, err := io.ReadAll(c)
	e.must(err)
}

// TestBaggage: a source that is in no file of the destination's node has the name
// that its own node gives it, within its own namespace.
func TestBaggage(t *testing.T) {
	userSpace(t)
	e := setup(t)
	d := []*lab.Daemon{
		e.startOn(e.Nodes[0], lab.DaemonConfig{}),
		// This one knows nobody of the other node.
		e.startOn(e.Nodes[1], lab.DaemonConfig{Workloads: []lab.Workload{e.Pod(2, 1).Workload(), e.Pod(2, 2).Workload()}}),
	}
	stranger, server := e.Pod(1, 3), e.Pod(2, 1)
	app, err := server.Echo(8080)
	e.must(err)
	svid := e.svid(e.authority(), stranger.Identity())
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		dst := app.Addr(family)
		logged := func(call func()) (namespace, workload string) {
			watch := e.watch(d[1])
			call()
			l := watch.closed("inbound", dst)
			return l.String("src.namespace"), l.String("src.workload")
		}
		for _, p := range []*lab.Pod{e.Pod(1, 1), e.Pod(1, 2)} { // as our own node says it
			if namespace, workload := logged(func() { e.whole(p, dst) }); namespace != p.Namespace || workload != p.Name {
				t.Errorf("the source %s/%s is logged as %s/%s", p.Namespace, p.Name, namespace, workload)
			}
		}
		s, err := e.session(stranger, server.Addr(family), peerTLS(svid))
		e.must(err)
		for baggage, want := range map[string]string{
			"k8s.namespace.name=demo,k8s.pod.name=p":        "demo/p",
			"k8s.namespace.name=demo,k8s.deployment.name=q": "demo/q",
			"k8s.namespace.name=other,k8s.pod.name=p":       "/", // not its own
			"x": "/",
		} {
			namespace, workload := logged(func() {
				stream, err := s.carry(dst, "baggage", baggage)
				e.must(err)
				e.must(s.WriteRSTStream(stream, http2.ErrCodeCancel))
			})
			if got := namespace + "/" + workload; got != want {
				t.Errorf("baggage %q is logged as %s, want %s", baggage, got, want)
			}
		}
		// A name that somebody claims is no label: there might be any number.
		if n := e.sum(d[1], "istio_tcp_connections_opened_total", "source_workload", "p"); n != 0 {
			t.Errorf("%v connections are counted under a name that was claimed", n)
		}
	})
}

// TestTraceparent: both lines of one connection have its trace.
func TestTraceparent(t *testing.T) {
	userSpace(t)
	e, d := mesh(t)
	stranger, client, server := e.Pod(1, 3), e.Pod(1, 1), e.Pod(2, 1)
	app, err := server.Echo(8080)
	e.must(err)
	svid := e.svid(e.authority(), stranger.Identity())
	seen := map[string]bool{}
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		dst := app.Addr(family)
		for range 2 {
			out, in := e.watch(d[0]), e.watch(d[1])
			e.whole(client, dst)
			source, destination := out.closed("outbound", dst).String("trace"), in.closed("inbound", dst).String("trace")
			if source != destination || len(source) != 32 || seen[source] {
				t.Errorf("the source logs trace %q, the destination %q, want the same, of 32 digits, and another each time", source, destination)
			}
			seen[source] = true
		}
		// Of another implementation: what is well-formed is taken.
		s, err := e.session(stranger, server.Addr(family), peerTLS(svid))
		e.must(err)
		for traceparent, want := range map[string]string{
			"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01": "0af7651916cd43dd8448eb211c80319c",
			"00-1bf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00": "1bf7651916cd43dd8448eb211c80319c",
			"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01": "",
			"00-00000000000000000000000000000000-b7ad6b7169203331-01": "",
			"what": "",
		} {
			in := e.watch(d[1])
			stream, err := s.carry(dst, "traceparent", traceparent)
			if err != nil {
				t.Fatalf("traceparent %q: %v", traceparent, err)
			}
			e.must(s.WriteRSTStream(stream, http2.ErrCodeCancel))
			if got := in.closed("inbound", dst).String("trace"); got != want {
				t.Errorf("traceparent %q is logged as %q, want %q", traceparent, got, want)
			}
		}
	})
}
