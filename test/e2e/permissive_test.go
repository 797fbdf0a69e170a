// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// modeOf is a policy file with one mode, for the first pod of the second node.
func modeOf(e *env, mode string) string {
	p := e.Pod(2, 1)
	return fmt.Sprintf("modes:\n- {name: legacy, namespace: %s, workload: %s, %s}\n", p.Namespace, p.Name, mode)
}

func (e *env) setPolicy(text string, ds ...*lab.Daemon) {
	e.t.Helper()
	for _, d := range ds {
		e.reloads(d, "policy", "ok", func() { e.replace(d.Node, "policy.yaml", text) })
	}
}

// permissive is a mesh in which the first pod of the second node takes plaintext
// but for port 9090.
func permissive(t *testing.T) (*env, []*lab.Daemon) {
	t.Helper()
	e := setup(t)
	for _, n := range e.Nodes {
		e.replace(n, "policy.yaml", modeOf(e, "mode: permissive, ports: {9090: strict}"))
	}
	return e, e.start(lab.DaemonConfig{Settings: map[string]any{"policy": map[string]any{"file": "policy.yaml"}}})
}

// hostEnd captures at a pod's door: outside of it.
func (e *env) hostEnd(p *lab.Pod, markers ...string) *capture.Capture {
	e.t.Helper()
	return e.capture(capture.Config{NS: p.Node.NS, Interface: p.HostEnd(), Markers: markers})
}

// shut asserts that a port refuses at the first SYN: there is no handshake, and
// the client has not had to ask again.
func (e *env) shut(from *lab.Pod, to netip.AddrPort) {
	e.t.Helper()
	door := e.hostEnd(e.Pod(2, 1))
	if to.Addr() == e.Pod(2, 2).V4 || to.Addr() == e.Pod(2, 2).V6 {
		door = e.hostEnd(e.Pod(2, 2))
	}
	if _, err := e.dial(from, to); !isRefused(err) {
		e.t.Errorf("plaintext to %s: %v, want it refused", to, err)
	}
	if n, _ := door.Count(func(s capture.Segment) bool { return s.Has(capture.SYN|capture.ACK) && s.Src == to }); n != 0 {
		e.t.Errorf("plaintext to %s: %d handshakes were answered", to, n)
	}
	if n, _ := door.Count(func(s capture.Segment) bool { return s.Has(capture.SYN) && s.Dst == to }); n != 1 {
		e.t.Errorf("plaintext to %s: refused after %d SYNs, want it after the first", to, n)
	}
}

// plainLine waits for the line of a connection in plaintext.
func (e *env) plainLine(d *lab.Daemon, src net.Addr, dst netip.AddrPort) lab.Entry {
	e.t.Helper()
	found, err := d.WaitAccessLog(e.ctx, 1, func(l lab.Entry) bool {
		return l.String("direction") == "inbound" && l.String("dst.addr") == dst.String() && l.String("src.addr") == src.String()
	})
	if err != nil {
		e.t.Fatal(err)
	}
	return found[0]
}

// A client outside the mesh reaches a port that takes plaintext, and is seen as
// who it is. Clients of the mesh are carried to the same port. Another port of the
// same pod is shut.
func TestPermissive(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := permissive(t)
		server := e.Pod(2, 1)
		app, err := server.Echo(8080)
		e.must(err)
		strict, err := server.Echo(9090)
		e.must(err)

		door := e.hostEnd(server, marker)
		stranger := e.connect(e.Pod(1, 3), app.Addr(family))
		e.must(exchange(stranger, marker))
		if got := lab.Peer(stranger); got != app.Addr(family) {
			t.Errorf("the client's peer is %s, want %s", got, app.Addr(family))
		}
		if got := app.Peers()[0].Addr(); got != e.Pod(1, 3).Addr(family) {
			t.Errorf("the server's peer is %s, want the client's address %s", got, e.Pod(1, 3).Addr(family))
		}
		if door.Seen(0) == 0 {
			t.Error("control: the marker in plaintext was not seen")
		}
		src := stranger.LocalAddr()
		stranger.CloseWrite()
		if _, err := io.ReadAll(stranger); err != nil { // the half-close crosses
			t.Errorf("the end of the connection: %v", err)
		}
		l := e.plainLine(d[1], src, app.Addr(family))
		for field, want := range map[string]string{
			"reason": "ok", "connection_security_policy": "none", "src.identity": "", "src.workload": "", "tls.version": "",
			"dst.identity": server.Identity(), "dst.workload": server.Name, "policy.rule": "legacy",
			"bytes_recv": fmt.Sprint(len(marker)), "bytes_sent": fmt.Sprint(len(marker)),
		} {
			if got := l.String(field); got != want {
				t.Errorf("log: %s is %q, want %q", field, got, want)
			}
		}
		for _, name := range []string{"istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total"} {
			if n := e.sum(d[1], name, "connection_security_policy", "none", "source_principal", "unknown", "destination_workload", server.Name); n != 1 {
				t.Errorf("%s counts %v in plaintext, want 1", name, n)
			}
		}

		// A client of the mesh, to the same port.
		again := e.hostEnd(server, marker)
		c := e.connect(e.Pod(1, 1), app.Addr(family))
		e.must(exchange(c, marker))
		c.Close()
		if again.Seen(0) != 0 || outside(again) != 0 {
			t.Error("a client of the mesh was carried in plaintext")
		}
		if inside(again) < int64(2*len(marker)) {
			t.Error("a client of the mesh was not carried by the tunnel")
		}
		found, err := d[1].WaitAccessLog(e.ctx, 1, func(l lab.Entry) bool { return l.String("src.identity") == e.Pod(1, 1).Identity() })
		if err != nil || found[0].String("connection_security_policy") != "mutual_tls" {
			t.Errorf("its line: %v, %v", found, err)
		}

		// The node itself is outside too: so the kubelet's probes are served.
		reached := len(app.Peers())
		e.must(e.Nodes[1].Do(func() error {
			c, err := net.DialTimeout("tcp", app.Addr(family).String(), patience())
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience()))
			return exchange(c, marker)
		}))
		if n := len(app.Peers()) - reached; n != 1 {
			t.Errorf("the node's call made %d connections", n)
		}

		e.shut(e.Pod(1, 3), strict.Addr(family))
		refused, err := d[1].WaitAccessLog(e.ctx, 1, func(l lab.Entry) bool { return l.String("dst.addr") == strict.Addr(family).String() })
		if err != nil || refused[0].String("reason") != "denied" || refused[0].String("policy.rule") != "legacy" {
			t.Errorf("the refusal's line: %v, %v", refused, err)
		}
		if n := len(strict.Peers()); n != 0 {
			t.Errorf("%d connections to a STRICT port", n)
		}
		e.must(exchange(e.connect(e.Pod(1, 1), strict.Addr(family)), marker)) // control: the port is served
		// Another pod of the node is STRICT as ever.
		other, err := e.Pod(2, 2).Echo(8080)
		e.must(err)
		e.shut(e.Pod(1, 3), other.Addr(family))
	})
}

// The modes change under live connections.
func TestModeFlips(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := ruled(t)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		spared, err := e.Pod(2, 1).Echo(7070)
		e.must(err)
		carried := e.connect(e.Pod(1, 1), app.Addr(family))
		e.must(exchange(carried, "before"))
		for range 2 {
			e.shut(e.Pod(1, 3), app.Addr(family))

			e.setPolicy(modeOf(e, "mode: permissive"), d[1])
			held, kept := e.connect(e.Pod(1, 3), app.Addr(family)), e.connect(e.Pod(1, 3), spared.Addr(family))
			e.must(exchange(held, marker))
			e.must(exchange(kept, marker))

			e.setPolicy(modeOf(e, "ports: {8080: strict, 7070: permissive}"), d[1])
			if _, err := io.ReadAll(held); !isReset(err) {
				t.Errorf("a connection in plaintext to a port that turned STRICT ended with %v, want a reset", err)
			}
			l := e.plainLine(d[1], held.LocalAddr(), app.Addr(family))
			if l.String("reason") != "denied" || l.String("detail") != "legacy" || l.String("policy.rule") != "legacy" {
				t.Errorf("its line: %v", l)
			}
			e.shut(e.Pod(1, 3), app.Addr(family))
			e.must(exchange(kept, "after")) // of a port that did not

			e.setPolicy(noRules, d[1]) // the mesh's own mode
			if _, err := io.ReadAll(kept); !isReset(err) {
				t.Errorf("a connection in plaintext to a pod that turned STRICT ended with %v, want a reset", err)
			}
			l = e.plainLine(d[1], kept.LocalAddr(), spared.Addr(family))
			if l.String("reason") != "denied" || l.String("policy.rule") != "default-mode" {
				t.Errorf("its line: %v", l)
			}
		}
		e.must(exchange(carried, "after"))
	})
}

// The mesh's mode by the configuration, and what is narrower than it. The status
// and the configuration's check say what is in force.
func TestPermissiveMesh(t *testing.T) {
	e := setup(t)
	for _, n := range e.Nodes {
		e.replace(n, "policy.yaml", "modes:\n- {name: closed, namespace: demo, workload: pod2-2, mode: strict}\n")
	}
	d := e.start(lab.DaemonConfig{Settings: map[string]any{"mode": "permissive", "policy": map[string]any{"file": "policy.yaml"}}})
	open, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	closed, err := e.Pod(2, 2).Echo(8080)
	e.must(err)
	e.must(exchange(e.connect(e.Pod(1, 3), open.Addr(4)), marker))
	e.shut(e.Pod(1, 3), closed.Addr(4))
	s := e.status(d[1])
	for _, want := range []string{"the mesh: permissive (default-mode)", "demo/pod2-2: strict (closed)"} {
		if !strings.Contains(s, want) {
			t.Errorf("the status does not say %q:\n%s", want, s)
		}
	}
	// A file's mode for the mesh wins, and takes effect without a restart.
	e.setPolicy("modes:\n- {name: shut, mode: strict}\n", d[1])
	e.shut(e.Pod(1, 3), open.Addr(4))
}

// Rules know sources by their identities, and who comes in plaintext has none: a
// rule stops the identity, and not the machine.
func TestRulesInPlaintext(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := permissive(t)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		client := e.Pod(1, 1)
		e.setPolicy(denial("no-one", client)+modeOf(e, "mode: permissive"), d[1])
		if err := e.try(client, app.Addr(family)); err == nil {
			t.Error("control: by mutual TLS the identity is not denied")
		}
		e.setPods(d[0], entryOf(e.Pod(1, 2))) // the same pod, outside the mesh
		e.must(e.call(client, app.Addr(family)))
		e.setPolicy(denial("no-one", client), d[1]) // STRICT keeps it out
		e.shut(client, app.Addr(family))
	})
}

// Without its daemon a port that takes plaintext is shut, and what was let in is
// reset.
func TestPermissiveFailsClosed(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := permissive(t)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		held := e.connect(e.Pod(1, 3), app.Addr(family))
		e.must(exchange(held, marker))
		d[1].Kill()
		if _, err := io.ReadAll(held); !isReset(err) {
			t.Errorf("a connection that was let in ended with %v, want a reset", err)
		}
		e.shut(e.Pod(1, 3), app.Addr(family))
		if n := len(app.Peers()); n != 1 {
			t.Errorf("%d connections reached the application, want 1", n)
		}
		e.startOn(e.Nodes[1], lab.DaemonConfig{Settings: map[string]any{"policy": map[string]any{"file": "policy.yaml"}}})
		e.must(exchange(e.connect(e.Pod(1, 3), app.Addr(family)), marker))
	})
}

// The tunnel's own ports are nobody's, from outside and from inside the pod.
func TestPlaintextPortIsNotDialled(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := permissive(t)
		server := e.Pod(2, 1)
		app, err := server.Echo(8080)
		e.must(err)
		loopback := netip.MustParseAddr("127.0.0.1")
		if family == 6 {
			loopback = netip.IPv6Loopback()
		}
		for _, port := range []uint16{15001, 15006} {
			e.shut(e.Pod(1, 3), netip.AddrPortFrom(server.Addr(family), port))
			for _, a := range []netip.Addr{server.Addr(family), loopback} {
				if _, err := e.dial(server, netip.AddrPortFrom(a, port)); !isRefused(err) {
					t.Errorf("the pod's own call of %s, port %d: %v, want it refused", a, port, err)
				}
			}
		}
		if n := e.sum(d[1], "culvert_connections_closed_total", "reporter", "destination"); n != 0 {
			t.Errorf("%v connections reached the tunnel", n)
		}
		e.must(exchange(e.connect(e.Pod(1, 3), app.Addr(family)), marker)) // control
	})
}

// Nobody listens: the client is reset, and told nothing else.
func TestPlaintextToNobody(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := permissive(t)
		to := netip.AddrPortFrom(e.Pod(2, 1).Addr(family), 8081)
		c, err := e.dial(e.Pod(1, 3), to)
		if err == nil { // else the reset was there before the client had looked
			_, err = io.ReadAll(c)
		}
		if !isReset(err) {
			t.Errorf("ended with %v, want a reset", err)
		}
		if l := e.line(d[1], "inbound", to); l.String("reason") != "refused" || l.String("connection_security_policy") != "none" {
			t.Errorf("its line: %v", l)
		}
	})
}
