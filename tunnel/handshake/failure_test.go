// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

// wantFailure fails unless err is a failure of that reason, and returns its
// detail.
func wantFailure(t *testing.T, err error, reason identity.Reason) string {
	t.Helper()
	var f *identity.Failure
	if !errors.As(err, &f) {
		t.Fatalf("got %v, want a failure of reason %s", err, reason)
	}
	if f.Reason != reason {
		t.Fatalf("got %v, want %s", f, reason)
	}
	return f.Detail
}

// Every reason of the peer check, at either end, and what the other end hears of
// it.
func TestPeerCheck(t *testing.T) {
	a, foreign := newAuthority(t, meshTD), newAuthority(t, meshTD)
	other := spiffeid.RequireFromString("spiffe://other.example/ns/demo/sa/server")
	mallory := spiffeid.RequireFromString("spiffe://mesh.example/ns/demo/sa/mallory")
	for _, tc := range []struct {
		name   string
		svid   func(id spiffeid.ID) *identity.SVID
		change func(cfg *Config) // of the side that checks
		reason identity.Reason
		alert  uint8
	}{
		{
			name: "no URI",
			svid: func(id spiffeid.ID) *identity.SVID {
				return a.svid(id, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"server"} })
			},
			reason: identity.ReasonSVIDMalformed, alert: record.AlertBadCertificate,
		},
		{
			name: "two URIs",
			svid: func(id spiffeid.ID) *identity.SVID {
				return a.svid(id, func(c *x509.Certificate) { c.URIs = []*url.URL{id.URL(), mallory.URL()} })
			},
			reason: identity.ReasonSVIDMalformed, alert: record.AlertBadCertificate,
		},
		{
			name: "CA as leaf",
			svid: func(id spiffeid.ID) *identity.SVID {
				return a.svid(id, func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign })
			},
			reason: identity.ReasonSVIDMalformed, alert: record.AlertBadCertificate,
		},
		{
			name: "not a SPIFFE ID",
			svid: func(id spiffeid.ID) *identity.SVID {
				return a.svid(id, func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "https", Host: "mesh.example"}} })
			},
			reason: identity.ReasonSVIDMalformed, alert: record.AlertBadCertificate,
		},
		{
			name: "not yet valid",
			svid: func(id spiffeid.ID) *identity.SVID {
				return a.svid(id, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(20 * time.Minute) })
			},
			reason: identity.ReasonCertificateNotYetValid, alert: record.AlertCertificateExpired,
		},
		{
			name: "expired",
			svid: func(id spiffeid.ID) *identity.SVID {
				return a.svid(id, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })
			},
			reason: identity.ReasonCertificateExpired, alert: record.AlertCertificateExpired,
		},
		{
			name:   "unknown trust domain",
			svid:   func(spiffeid.ID) *identity.SVID { return a.svid(other) },
			reason: identity.ReasonTrustDomainUnknown, alert: record.AlertUnknownCA,
		},
		{
			name:   "foreign root",
			svid:   func(id spiffeid.ID) *identity.SVID { return foreign.svid(id) },
			reason: identity.ReasonChainValidationFailed, alert: record.AlertUnknownCA,
		},
		{
			name: "intermediate missing",
			svid: func(id spiffeid.ID) *identity.SVID {
				s := a.svid(id)
				s.Certificates = s.Certificates[:1]
				return s
			},
			reason: identity.ReasonChainValidationFailed, alert: record.AlertUnknownCA,
		},
		{
			name: "revoked",
			svid: func(id spiffeid.ID) *identity.SVID { return a.svid(id) },
			change: func(cfg *Config) {
				cfg.Verifier.Denied = func(*x509.Certificate, spiffeid.ID) (string, bool) { return "by a test", true }
			},
			reason: identity.ReasonRevoked, alert: record.AlertCertificateRevoked,
		},
		{
			name:   "another identity",
			svid:   func(spiffeid.ID) *identity.SVID { return a.svid(mallory) },
			change: func(cfg *Config) { cfg.Expect = serverID },
			reason: identity.ReasonIdentityMismatch, alert: record.AlertAccessDenied,
		},
	} {
		t.Run(tc.name+"/server", func(t *testing.T) { // the client checks it
			cc, sc := sockets(t)
			client, server := a.client(), a.server()
			server.SVID = tc.svid(serverID)
			if tc.change != nil {
				tc.change(&client)
			}
			c, s := both(t, cc, sc, client, server)
			detail := wantFailure(t, c.err, tc.reason)
			t.Logf("%s: %s", tc.reason, detail)
			if d := wantFailure(t, s.err, identity.ReasonRefusedByPeer); d != record.AlertName(tc.alert) {
				t.Errorf("server heard %q, want %s", d, record.AlertName(tc.alert))
			}
		})
		t.Run(tc.name+"/client", func(t *testing.T) { // the server checks it
			cc, sc := sockets(t)
			client, server := a.client(), a.server()
			client.SVID = tc.svid(clientID)
			if tc.change != nil {
				tc.change(&server)
			}
			c, s := both(t, cc, sc, client, server)
			wantFailure(t, s.err, tc.reason)
			if c.err != nil {
				t.Fatalf("client: %v; in TLS 1.3 it cannot know yet", c.err)
			}
			refusedAtFirstRecord(t, newStream(t, cc, c.Result), tc.alert)
		})
	}
}

// refusedAtFirstRecord expects the peer's alert as the first record.
func refusedAtFirstRecord(t *testing.T, s *stream, alert uint8) {
	t.Helper()
	var pa *record.PeerAlert
	data, err := s.next()
	if !errors.As(err, &pa) || data != "" {
		t.Fatalf("first record: %q, %v, want an alert", data, err)
	}
	if d := wantFailure(t, FromAlert(pa), identity.ReasonRefusedByPeer); d != record.AlertName(alert) {
		t.Errorf("client heard %q, want %s", d, record.AlertName(alert))
	}
}

// peerTLS is a peer that does as it likes.
func peerTLS(svid *identity.SVID, change func(*tls.Config)) *tls.Config {
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, ClientAuth: tls.RequestClientCert}
	cert := tls.Certificate{PrivateKey: svid.Key}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	cfg.Certificates = []tls.Certificate{cert}
	if change != nil {
		change(cfg)
	}
	return cfg
}

func TestProtocol(t *testing.T) {
	a := newAuthority(t, meshTD)
	for _, tc := range []struct {
		name   string
		change func(*tls.Config)
		server bool // the peer is the server
		reason identity.Reason
		detail string
		alert  string // in the peer's error
	}{
		{name: "client without certificate", change: func(c *tls.Config) { c.Certificates = nil },
			reason: identity.ReasonNoCertificate, alert: "certificate required"},
		{name: "client without ALPN", change: func(c *tls.Config) { c.NextProtos = nil },
			reason: identity.ReasonTLSProtocol, detail: "ALPN", alert: "no application protocol"},
		{name: "client with other ALPN", change: func(c *tls.Config) { c.NextProtos = []string{"spdy/3"} },
			reason: identity.ReasonTLSProtocol, detail: "application protocol", alert: "no application protocol"},
		// crypto/tls lets this one through without a protocol.
		{name: "client with HTTP/1.1", change: func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} },
			reason: identity.ReasonTLSProtocol, detail: "ALPN", alert: "no application protocol"},
		{name: "client with TLS 1.2", change: func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
			reason: identity.ReasonTLSProtocol, detail: "version", alert: "protocol version"},
		{name: "server without ALPN", server: true, change: func(c *tls.Config) { c.NextProtos = nil },
			reason: identity.ReasonTLSProtocol, detail: "ALPN", alert: "no application protocol"},
		{name: "server with other ALPN", server: true, change: func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} },
			reason: identity.ReasonRefusedByPeer, detail: "no_application_protocol"},
		{name: "server with TLS 1.2", server: true, change: func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
			reason: identity.ReasonRefusedByPeer, detail: "protocol_version"},
		{name: "server that asks for no certificate", server: true, change: func(c *tls.Config) { c.ClientAuth = tls.NoClientCert },
			reason: identity.ReasonTLSProtocol, detail: "asked for no certificate", alert: "handshake failure"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			us, peer := sockets(t)
			said := make(chan error)
			go func() {
				var c *tls.Conn
				if tc.server {
					c = tls.Server(peer, peerTLS(a.svid(serverID), tc.change))
				} else {
					c = tls.Client(peer, peerTLS(a.svid(clientID), tc.change))
				}
				err := c.Handshake()
				if err == nil {
					_, err = c.Read(make([]byte, 1))
				}
				said <- err
			}()
			var err error
			if tc.server {
				_, err = Client(context.Background(), us, a.client())
			} else {
				_, err = Server(context.Background(), us, a.server())
			}
			if d := wantFailure(t, err, tc.reason); !strings.Contains(d, tc.detail) {
				t.Errorf("detail %q, want %q in it", d, tc.detail)
			}
			us.Close()
			if err := <-said; tc.alert != "" && (err == nil || !strings.Contains(err.Error(), "remote error: tls: "+tc.alert)) {
				t.Errorf("peer heard %v, want %q", err, tc.alert)
			}
		})
	}
}

// A peer that resumes or names a server is none of ours, and is served.
func TestServerNameIsNeitherSentNorRefused(t *testing.T) {
	a := newAuthority(t, meshTD)
	us, peer := sockets(t)
	go tls.Client(peer, peerTLS(a.svid(clientID), func(c *tls.Config) {
		c.ServerName = "server.example"
		c.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	})).Handshake()
	if _, err := Server(context.Background(), us, a.server()); err != nil {
		t.Error(err)
	}

	us, peer = sockets(t)
	names := make(chan string, 1)
	go tls.Server(peer, peerTLS(a.svid(serverID), func(c *tls.Config) {
		c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			names <- h.ServerName
			return nil, nil
		}
	})).Handshake()
	if _, err := Client(context.Background(), us, a.client()); err != nil {
		t.Fatal(err)
	}
	if n := <-names; n != "" {
		t.Errorf("SNI %q", n)
	}
}

// A server that names authorities that did not sign our certificate gets it
// nevertheless.
func TestAuthoritiesNamedByTheServerChangeNothing(t *testing.T) {
	a, foreign := newAuthority(t, meshTD), newAuthority(t, meshTD)
	us, peer := sockets(t)
	got := make(chan int, 1)
	go tls.Server(peer, peerTLS(a.svid(serverID), func(c *tls.Config) {
		c.ClientCAs = x509.NewCertPool()
		c.ClientCAs.AddCert(foreign.root)
		c.VerifyConnection = func(s tls.ConnectionState) error { got <- len(s.PeerCertificates); return nil }
	})).Handshake()
	if _, err := Client(context.Background(), us, a.client()); err != nil {
		t.Fatal(err)
	}
	if n := <-got; n != 2 {
		t.Errorf("%d certificates, want 2", n)
	}
}

func TestGarbage(t *testing.T) {
	a := newAuthority(t, meshTD)
	record16k := append([]byte{22, 3, 1, 0x40, 0}, make([]byte, 16384)...)
	huge := append([]byte{22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff}, make([]byte, 16384-4)...) // a ClientHello of 64 KiB
	for name, sent := range map[string][]byte{
		"HTTP":           []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"zeros":          make([]byte, 1000),
		"zero record":    record16k,
		"too much":       append(append(append(append(huge, record16k...), record16k...), record16k...), record16k...),
		"half a header":  {22, 3},
		"half a record":  {22, 3, 1, 1, 0, 1, 0},
		"nothing at all": {},
	} {
		t.Run(name, func(t *testing.T) {
			us, peer := sockets(t)
			go func() {
				peer.Write(sent)
				peer.(*net.UnixConn).CloseWrite()
			}()
			_, err := Server(context.Background(), us, a.server())
			d := wantFailure(t, err, identity.ReasonTLSProtocol)
			t.Log(d)
			if name == "too much" && !strings.Contains(d, "more than 65536 bytes") {
				t.Errorf("detail %q", d)
			}
		})
	}
}

func TestTimeout(t *testing.T) {
	a := newAuthority(t, meshTD)
	us, peer := sockets(t)
	cfg := a.server()
	cfg.Timeout = 50 * time.Millisecond
	_, err := Server(context.Background(), us, cfg)
	wantFailure(t, err, identity.ReasonTimeout)

	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err = Client(ctx, peer, a.client())
	wantFailure(t, err, identity.ReasonTimeout)
}

// A reset is not the peer's opinion on our certificate.
func TestPeerGoesAway(t *testing.T) {
	a := newAuthority(t, meshTD)
	us, peer := sockets(t)
	go func() {
		peer.Read(make([]byte, 10))
		peer.Close()
	}()
	_, err := Client(context.Background(), us, a.client())
	wantFailure(t, err, identity.ReasonTLSProtocol)
}

// A peer that has a certificate, and not its key.
func TestCertificateWithoutItsKey(t *testing.T) {
	a := newAuthority(t, meshTD)
	for _, server := range []bool{true, false} {
		cc, sc := sockets(t)
		client, srv := a.client(), a.server()
		if server {
			srv.SVID.Key = newKey(t)
		} else {
			client.SVID.Key = newKey(t)
		}
		c, s := both(t, cc, sc, client, srv)
		checker := c.err
		if !server {
			checker = s.err
		}
		d := wantFailure(t, checker, identity.ReasonTLSProtocol)
		if !strings.Contains(d, "signature") {
			t.Errorf("detail %q", d)
		}
	}
}
