// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// handshakeTimeout is what the daemons of these tests are told: long for a
// handshake on a busy machine, short for a peer that is silent on purpose.
func handshakeTimeout() time.Duration { return scaled(time.Second) }

// in is the same lab for a subtest.
func (e *env) in(t *testing.T) *env {
	sub := *e
	sub.t = t
	return &sub
}

// try is an exchange that may fail at any step: a reset can come before connect
// has returned.
func (e *env) try(from *lab.Pod, dst netip.AddrPort) error {
	c, err := e.dial(from, dst)
	if err != nil {
		return err
	}
	return exchange(c, marker)
}

// wrong is a peer that is wrong in one way, and what comes of it.
type wrong struct {
	name   string                         // of the subtest
	svid   func(id string) *identity.SVID // nil: a good one
	change func(*tls.Config)              // nil: nothing
	silent bool                           // accepts or connects, and says nothing

	reason identity.Reason
	detail string // is part of the daemon's
	alert  string // that the peer hears, as crypto/tls calls it; empty: none

	// Where the trust file makes the difference: with the one the peer is
	// refused, with the other the very same certificate is served.
	refusing, serving string
}

func (w wrong) config(good *identity.SVID) *tls.Config {
	svid := good
	if w.svid != nil {
		svid = w.svid(good.ID.String())
	}
	if w.change == nil {
		return peerTLS(svid)
	}
	return peerTLS(svid, w.change)
}

// peerCheck is a lab for peers that are wrong: a client of node 1 and a server of
// node 2 that are enrolled, and one of each that are not, the server known to the
// daemons as a workload all the same.
type peerCheck struct {
	*env
	ca                 *testca.CA
	client, stranger   *lab.Pod
	server, impostor   *lab.Pod
	app                *lab.App // of server
	plain              *lab.App // of impostor, at the same port
	listener           *peerServer
	daemons            []*lab.Daemon
	trust              string // the trust file that the daemons have
	goodClient, goodID *identity.SVID
}

func newPeerCheck(t *testing.T) *peerCheck {
	e := setup(t)
	e.takes(scaled(time.Minute)) // the peers of TestPeerCheck are many
	// Makes the root, below which the peers have their certificates.
	e.must(e.Nodes[0].Configure(lab.DaemonConfig{}))
	c := &peerCheck{
		env: e, ca: e.authority(),
		client: e.Pod(1, 1), stranger: e.Pod(1, 3),
		server: e.Pod(2, 1), impostor: e.Pod(2, 3),
	}
	c.goodClient, c.goodID = e.svid(c.ca, c.stranger.Identity()), e.svid(c.ca, c.impostor.Identity())
	var err error
	c.app, err = c.server.Echo(8080)
	e.must(err)
	c.plain, err = c.impostor.Echo(8080)
	e.must(err)
	c.listener = e.peerServer(c.impostor)
	return c
}

func (c *peerCheck) in(t *testing.T) *peerCheck {
	sub := *c
	sub.env = c.env.in(t)
	return &sub
}

// run starts the daemons, or starts them again with another trust file.
func (c *peerCheck) run(trust string) {
	c.t.Helper()
	if c.daemons != nil && c.trust == trust {
		return
	}
	for _, d := range c.daemons {
		c.must(d.Stop(c.ctx))
	}
	c.trust = trust
	c.daemons = nil
	for _, n := range c.Nodes {
		ca := map[string]any{"ca": map[string]any{"dir": filepath.Join(n.Dir, "ca")}}
		if trust != "" {
			file := filepath.Join(n.Dir, "trust.yaml")
			c.must(os.WriteFile(file, []byte(trust), 0o600))
			ca["trustFile"] = file
		}
		c.daemons = append(c.daemons, c.startOn(n, lab.DaemonConfig{
			Workloads: append(c.enrolled(), c.impostor.Workload()),
			Settings:  map[string]any{"identity": ca, "tunnel": map[string]any{"handshakeTimeout": handshakeTimeout().String()}},
		}))
	}
}

// root writes a CA's root to a file and returns its path.
func (c *peerCheck) root(name string, ca *testca.CA) string {
	c.t.Helper()
	return writeRoot(c.env, filepath.Join(c.Dir, name), ca.Root)
}

func writeRoot(e *env, path string, root *x509.Certificate) string {
	e.t.Helper()
	e.must(os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}), 0o600))
	return path
}

// refuseClient has a wrong client before the daemon of node 2.
func (c *peerCheck) refuseClient(family int, w wrong) {
	c.t.Helper()
	dst := c.app.Addr(family)
	reached := len(c.app.Peers())
	wire := c.capture(capture.Config{NS: c.Nodes[1].NS, Interface: c.server.HostEnd(), Markers: []string{marker}})
	watch := c.watch(c.daemons[1])
	err := c.knock(dst, w)
	if err == nil {
		c.t.Fatal("the client was served")
	}
	if got := alert(err); got != w.alert {
		c.t.Errorf("the client heard %v, want the alert %q", err, w.alert)
	}
	watch.failed("destination", w.reason, w.detail)
	if n := len(c.app.Peers()) - reached; n != 0 {
		c.t.Errorf("%d connections to the application", n)
	}
	c.nothingOn(wire)
}

// knock is a wrong client.
func (c *peerCheck) knock(dst netip.AddrPort, w wrong) error {
	if !w.silent {
		return c.ask(c.stranger, w.config(c.goodClient), dst)
	}
	raw := c.connect(c.stranger, netip.AddrPortFrom(dst.Addr(), hbonePort))
	b, err := io.ReadAll(raw)
	switch {
	case len(b) > 0:
		c.t.Errorf("a client that said nothing got %q", b)
	case isTimeout(err):
		return nil // it is still waiting: served, as far as that goes
	}
	return fmt.Errorf("closed: %w", errors.Join(err, io.EOF))
}

// serveClient is the control: a client that is let in.
func (c *peerCheck) serveClient(family int, cfg *tls.Config) {
	c.t.Helper()
	reached := len(c.app.Peers())
	watch := c.watch(c.daemons[1])
	if err := c.ask(c.stranger, cfg, c.app.Addr(family)); err != nil {
		c.t.Errorf("control: a good client: %v", err)
	}
	watch.counted(0, 1, "destination", "")
	if n := len(c.app.Peers()) - reached; n != 1 {
		c.t.Errorf("control: %d connections of a good client to the application", n)
	}
}

// refuseServer has a wrong server before the daemon of node 1.
func (c *peerCheck) refuseServer(family int, w wrong) {
	c.t.Helper()
	dst := c.plain.Addr(family)
	reached := len(c.plain.Peers())
	wire := c.wire(marker)
	watch := c.watch(c.daemons[0])
	if w.silent {
		c.listener.silent()
	} else {
		c.listener.serve(w.config(c.goodID))
	}
	if err := c.try(c.client, dst); !isReset(err) {
		c.t.Errorf("the application saw %v, want a reset", err)
	}
	said := c.heard()
	if got := alert(said.err); got != w.alert {
		c.t.Errorf("the server heard %v, want the alert %q", said.err, w.alert)
	}
	if bytes.Contains(said.data, []byte(marker)) {
		c.t.Errorf("the server was told %q", said.data)
	}
	watch.failed("source", w.reason, w.detail)
	l := watch.closed("outbound", dst)
	if l.String("reason") != "tunnel_lost" || !strings.Contains(l.String("detail"), string(w.reason)) {
		c.t.Errorf("access log: reason %q, detail %q", l.String("reason"), l.String("detail"))
	}
	// Only a server that has refused us has been proven to be who it is.
	if id := l.String("dst.identity"); id != "" && w.reason != identity.ReasonRefusedByPeer {
		c.t.Errorf("access log: dst.identity is %q of a server that was refused", id)
	}
	if n := len(c.plain.Peers()) - reached; n != 0 {
		c.t.Errorf("%d connections to the application, past the tunnel", n)
	}
	c.nothingOn(wire)
}

func (c *peerCheck) heard() heard {
	c.t.Helper()
	select {
	case h := <-c.listener.told:
		return h
	case <-time.After(2 * patience()):
		c.t.Fatal("nobody came to the server")
		return heard{}
	}
}

// serveServer is the control: a server that is talked to.
func (c *peerCheck) serveServer(family int, cfg *tls.Config) {
	c.t.Helper()
	dst := c.plain.Addr(family)
	watch := c.watch(c.daemons[0])
	hangUp := c.listener.serve(cfg)
	conn := c.connect(c.client, dst)
	if err := exchange(conn, marker); err != nil {
		c.t.Errorf("control: a good server: %v", err)
	}
	c.must(conn.CloseWrite())
	if _, err := io.ReadAll(conn); err != nil {
		c.t.Errorf("control: a good server: %v", err)
	}
	hangUp()
	if said := c.heard(); string(said.data) != marker {
		c.t.Errorf("control: a good server was told %q, %v", said.data, said.err)
	}
	watch.counted(0, 1, "source", "")
	if l := watch.closed("outbound", dst); l.String("reason") != "ok" || l.String("dst.identity") == "" {
		c.t.Errorf("control: access log: %v", l)
	}
}

// nothingOn wants a capture to have seen the tunnel and nothing of the data.
func (c *peerCheck) nothingOn(wire *capture.Capture) {
	c.t.Helper()
	if n := wire.Seen(0); n != 0 {
		c.t.Errorf("the marker is on the wire %d times", n)
	}
	if n := outside(wire); n != 0 {
		c.t.Errorf("%d segments with payload outside the tunnel", n)
	}
	if n, _ := wire.Count(func(s capture.Segment) bool { return s.Port(hbonePort) }); n == 0 {
		c.t.Error("the capture saw nothing of the attempt")
	}
}

// TestPeerCheck: every refusal of the peer check, at either end.
func TestPeerCheck(t *testing.T) {
	userSpace(t)
	c := newPeerCheck(t)

	// The control of the witness: with no daemon it sees the marker.
	wire := c.capture(capture.Config{NS: c.Nodes[1].NS, Interface: c.server.HostEnd(), Markers: []string{marker}})
	c.must(exchange(c.connect(c.stranger, c.app.Addr(4)), marker))
	if wire.Seen(0) == 0 || outside(wire) == 0 {
		t.Error("control: the capture does not see the marker of a plain exchange")
	}

	foreign, err := testca.New(lab.TrustDomain)
	c.must(err)
	other, err := testca.New("other.example")
	c.must(err)
	spoilt := func(ca *testca.CA, options ...testca.Option) func(string) *identity.SVID {
		return func(id string) *identity.SVID { return c.svid(ca, id, options...) }
	}
	// The same certificate each time that it is asked for.
	kept := func(make func(string) *identity.SVID) func(string) *identity.SVID {
		have := map[string]*identity.SVID{}
		return func(id string) *identity.SVID {
			if have[id] == nil {
				have[id] = make(id)
			}
			return have[id]
		}
	}
	listed := kept(spoilt(c.ca))
	serial := func(id string) string { return listed(id).Certificates[0].SerialNumber.Text(16) }
	clientID, serverID := c.stranger.Identity(), c.impostor.Identity()

	// What both ends refuse.
	both := []wrong{
		{name: "svid_malformed/ca", svid: spoilt(c.ca, testca.IsCA),
			reason: identity.ReasonSVIDMalformed, detail: "CA certificate", alert: "bad certificate"},
		{name: "svid_malformed/two_uris", svid: spoilt(c.ca, testca.SecondURI),
			reason: identity.ReasonSVIDMalformed, detail: "2 URI SANs", alert: "bad certificate"},
		{name: "svid_malformed/none", svid: spoilt(c.ca, testca.NoURI),
			reason: identity.ReasonSVIDMalformed, detail: "no URI SAN", alert: "bad certificate"},
		{name: "svid_malformed/usage", svid: spoilt(c.ca, testca.NoDigitalSignature),
			reason: identity.ReasonSVIDMalformed, detail: "digitalSignature", alert: "bad certificate"},
		{name: "svid_malformed/extended_usage", svid: spoilt(c.ca, testca.ServerOnly),
			reason: identity.ReasonSVIDMalformed, detail: "clientAuth", alert: "bad certificate"},
		{name: "certificate_not_yet_valid", svid: spoilt(c.ca, testca.NotYetValid),
			reason: identity.ReasonCertificateNotYetValid, detail: "clocks", alert: "expired certificate"},
		{name: "certificate_expired", svid: spoilt(c.ca, testca.Expired),
			reason: identity.ReasonCertificateExpired, alert: "expired certificate"},
		{name: "chain_validation_failed/missing_intermediate", svid: spoilt(c.ca, testca.WithoutIntermediate),
			reason: identity.ReasonChainValidationFailed, detail: "sent no intermediate", alert: "unknown certificate authority"},
		{name: "chain_validation_failed/foreign_root", svid: kept(spoilt(foreign)),
			reason: identity.ReasonChainValidationFailed, alert: "unknown certificate authority",
			serving: trustRoots(lab.TrustDomain, c.root("foreign.pem", foreign))},
		{name: "revoked/serial", svid: listed,
			reason: identity.ReasonRevoked, detail: "serial number", alert: "revoked certificate",
			refusing: fmt.Sprintf("deny:\n  serials: [%q, %q]\n", serial(clientID), serial(serverID))},
		{name: "revoked/id", svid: listed,
			reason: identity.ReasonRevoked, detail: "SPIFFE ID", alert: "revoked certificate",
			refusing: fmt.Sprintf("deny:\n  ids: [%q, %q]\n", clientID, serverID)},
		{name: "timeout", silent: true, reason: identity.ReasonTimeout, detail: handshakeTimeout().String()},
	}
	alien := kept(func(string) *identity.SVID { return c.svid(other, "spiffe://other.example/ns/demo/sa/alien") })
	clients := append([]wrong{
		{name: "tls_protocol/tls12", change: func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
			reason: identity.ReasonTLSProtocol, detail: "version", alert: "protocol version not supported"},
		{name: "tls_protocol/no_alpn", change: func(c *tls.Config) { c.NextProtos = nil },
			reason: identity.ReasonTLSProtocol, detail: "ALPN", alert: "no application protocol"},
		{name: "tls_protocol/other_alpn", change: func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} },
			reason: identity.ReasonTLSProtocol, detail: "ALPN", alert: "no application protocol"},
		{name: "no_certificate", change: func(c *tls.Config) {
			c.Certificates = nil
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return new(tls.Certificate), nil }
		}, reason: identity.ReasonNoCertificate, alert: "certificate required"},
		{name: "trust_domain_unknown", svid: alien,
			reason: identity.ReasonTrustDomainUnknown, detail: "other.example", alert: "unknown certificate authority",
			serving: trustRoots("other.example", c.root("other.pem", other))},
		{name: "refused_by_peer", change: func(c *tls.Config) {
			c.VerifyConnection = func(tls.ConnectionState) error { return errors.New("not this one") }
		}, reason: identity.ReasonRefusedByPeer, detail: "bad_certificate"},
	}, both...)
	servers := append([]wrong{
		{name: "tls_protocol/no_alpn", change: func(c *tls.Config) { c.NextProtos = nil },
			reason: identity.ReasonTLSProtocol, detail: "ALPN", alert: "no application protocol"},
		{name: "tls_protocol/asks_for_no_certificate", change: func(c *tls.Config) { c.ClientAuth = tls.NoClientCert },
			reason: identity.ReasonTLSProtocol, detail: "no certificate", alert: "handshake failure"},
		{name: "trust_domain_unknown", svid: alien,
			reason: identity.ReasonTrustDomainUnknown, detail: "other.example", alert: "unknown certificate authority"},
		{name: "identity_mismatch", svid: func(string) *identity.SVID { return c.svid(c.ca, c.Pod(2, 2).Identity()) },
			reason: identity.ReasonIdentityMismatch, detail: c.Pod(2, 2).Identity(), alert: "access denied"},
		{name: "refused_by_peer/certificate", change: func(c *tls.Config) {
			c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
			c.ClientCAs.AddCert(foreign.Root)
		}, reason: identity.ReasonRefusedByPeer, detail: "unknown_ca"},
		// It is the server that refuses: a version, or a protocol.
		{name: "refused_by_peer/tls12", change: func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
			reason: identity.ReasonRefusedByPeer, detail: "protocol_version"},
		{name: "refused_by_peer/other_alpn", change: func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} },
			reason: identity.ReasonRefusedByPeer, detail: "no_application_protocol"},
	}, both...)

	for _, side := range []string{"client", "server"} {
		rows := clients
		if side == "server" {
			rows = servers
		}
		t.Run(side, func(t *testing.T) {
			for _, w := range rows {
				t.Run(w.name, func(t *testing.T) {
					sub := c.in(t)
					sub.run(w.refusing)
					families(t, func(t *testing.T, family int) {
						sub := sub.in(t)
						if side == "client" {
							sub.refuseClient(family, w)
							if w.refusing == "" {
								sub.serveClient(family, peerTLS(sub.goodClient))
							}
						} else {
							sub.refuseServer(family, w)
							if w.refusing == "" {
								sub.serveServer(family, peerTLS(sub.goodID))
							}
						}
					})
					if w.refusing != w.serving { // the control: the same certificate
						sub.run(w.serving)
						if side == "client" {
							sub.serveClient(4, w.config(sub.goodClient))
						} else {
							sub.serveServer(4, w.config(sub.goodID))
						}
					}
					c.daemons, c.trust = sub.daemons, sub.trust
				})
			}
		})
	}
}

// trustRoots is a trust file with a domain's roots.
func trustRoots(domain, file string) string {
	return fmt.Sprintf("trust:\n  - domain: %s\n    roots: [%q]\n", domain, file)
}

// TestForeignRoots: two daemons of which each is in order, and whose roots are
// not the same.
func TestForeignRoots(t *testing.T) {
	userSpace(t)
	e := setup(t)
	foreign, err := testca.New(lab.TrustDomain)
	e.must(err)
	e.must(foreign.WriteDir(filepath.Join(e.Nodes[1].Dir, "ca")))
	e.must(e.Nodes[0].Configure(lab.DaemonConfig{}))
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)

	// run starts a node's daemon with roots beside its own.
	run := func(e *env, node int, roots ...*x509.Certificate) *lab.Daemon {
		e.t.Helper()
		n := e.Nodes[node-1]
		settings := map[string]any{"ca": map[string]any{"dir": filepath.Join(n.Dir, "ca")}}
		for _, r := range roots {
			file := filepath.Join(n.Dir, "trust.yaml")
			e.must(os.WriteFile(file, []byte(trustRoots(lab.TrustDomain, writeRoot(e, filepath.Join(n.Dir, "other.pem"), r))), 0o600))
			settings = maps.Clone(settings)
			settings["trustFile"] = file
		}
		return e.startOn(n, lab.DaemonConfig{Settings: map[string]any{"identity": settings}})
	}
	refused := func(e *env, family int, one, two *lab.Daemon, byClient, byServer identity.Reason) {
		e.t.Helper()
		reached := len(app.Peers())
		wire := e.wire(marker)
		watch1, watch2 := e.watch(one), e.watch(two)
		if err := e.try(e.Pod(1, 1), app.Addr(family)); !isReset(err) {
			e.t.Errorf("the application saw %v, want a reset", err)
		}
		details := map[identity.Reason]string{identity.ReasonRefusedByPeer: "unknown_ca", identity.ReasonChainValidationFailed: "unknown authority"}
		watch1.failed("source", byClient, details[byClient])
		watch2.failed("destination", byServer, details[byServer])
		if l := watch1.closed("outbound", app.Addr(family)); l.String("reason") != "tunnel_lost" || !strings.Contains(l.String("detail"), string(byClient)) {
			e.t.Errorf("access log: reason %q, detail %q", l.String("reason"), l.String("detail"))
		}
		if n := len(app.Peers()) - reached; n != 0 {
			e.t.Errorf("%d connections to the application", n)
		}
		if wire.Seen(0) != 0 || outside(wire) != 0 || inside(wire) == 0 {
			e.t.Error("the wire carried something other than a handshake")
		}
	}

	one, two := run(e, 1), run(e, 2)
	t.Run("client_refuses", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			refused(e.in(t), family, one, two, identity.ReasonChainValidationFailed, identity.ReasonRefusedByPeer)
		})
	})
	e.must(one.Stop(e.ctx))
	one = run(e, 1, foreign.Root)
	t.Run("server_refuses", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			refused(e.in(t), family, one, two, identity.ReasonRefusedByPeer, identity.ReasonChainValidationFailed)
		})
	})
	e.must(two.Stop(e.ctx))
	two = run(e, 2, e.authority().Root)
	t.Run("control", func(t *testing.T) {
		families(t, func(t *testing.T, family int) {
			e := e.in(t)
			watch1, watch2 := e.watch(one), e.watch(two)
			e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(family)), marker))
			watch1.counted(0, 1, "source", "")
			watch2.counted(0, 1, "destination", "")
		})
	})
}
