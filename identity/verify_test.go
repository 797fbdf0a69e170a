// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/testca"
)

var (
	web   = spiffeid.RequireFromString("spiffe://mesh.example/ns/demo/sa/web")
	db    = spiffeid.RequireFromString("spiffe://mesh.example/ns/demo/sa/db")
	other = spiffeid.RequireFromString("spiffe://other.example/ns/demo/sa/web")
)

func newCA(t testing.TB, td string) *testca.CA {
	t.Helper()
	ca, err := testca.New(td)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func chain(t testing.TB, ca *testca.CA, id spiffeid.ID, options ...testca.Option) []*x509.Certificate {
	t.Helper()
	s, err := ca.SVID(id, options...)
	if err != nil {
		t.Fatal(err)
	}
	return s.Certificates
}

// signCA makes an intermediate under ca's root, which change may spoil.
func signCA(t testing.TB, ca *testca.CA, change func(*x509.Certificate)) *testca.CA {
	t.Helper()
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "spoilt intermediate"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if change != nil {
		change(template)
	}
	c, key, err := ca.Sign(template, true)
	if err != nil {
		t.Fatal(err)
	}
	return ca.With(c, key)
}

func uris(texts ...string) testca.Option {
	return testca.Change(func(c *x509.Certificate) {
		c.URIs = nil
		for _, text := range texts {
			u, err := url.Parse(text)
			if err != nil {
				panic(err)
			}
			c.URIs = append(c.URIs, u)
		}
	})
}

func usage(u x509.KeyUsage) testca.Option {
	return testca.Change(func(c *x509.Certificate) { c.KeyUsage = u })
}

func extUsage(u ...x509.ExtKeyUsage) testca.Option {
	return testca.Change(func(c *x509.Certificate) { c.ExtKeyUsage = u })
}

// at names a certificate as a detail has to.
func at(c *x509.Certificate) []string {
	return []string{fmt.Sprintf("serial %x", c.SerialNumber), c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339)}
}

func TestVerifyAccepts(t *testing.T) {
	mesh, partner := newCA(t, "mesh.example"), newCA(t, "other.example")
	v := identity.Verifier{Bundles: testca.Source{mesh, partner}}
	for _, tc := range []struct {
		name   string
		ca     *testca.CA
		id     spiffeid.ID
		expect spiffeid.ID
		option testca.Option
	}{
		{name: "anyone", id: web},
		{name: "the one expected", id: web, expect: web},
		{name: "another trust domain, by its own bundle", ca: partner, id: other, expect: other},
		{name: "no extended key usage", id: web, option: extUsage()},
		{name: "more usages than needed", id: web, option: extUsage(x509.ExtKeyUsageCodeSigning, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth)},
		{name: "further key usages", id: web, option: usage(x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement)},
		{name: "a DNS name beside the URI", id: web, option: testca.Change(func(c *x509.Certificate) { c.DNSNames = []string{"web.demo.svc"} })},
		{name: "a subject", id: web, option: testca.Change(func(c *x509.Certificate) { c.Subject.Organization = []string{"demo"} })},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ca, options := tc.ca, []testca.Option(nil)
			if ca == nil {
				ca = mesh
			}
			if tc.option != nil {
				options = append(options, tc.option)
			}
			certs := chain(t, ca, tc.id, options...)
			peer, failure := v.Verify(certs, tc.expect)
			if failure != nil {
				t.Fatal(failure)
			}
			if peer.ID != tc.id || peer.Certificate != certs[0] || !peer.Expiry.Equal(certs[0].NotAfter) {
				t.Errorf("got %s until %s", peer.ID, peer.Expiry)
			}
		})
	}
}

// Every way in which a leaf is no X.509-SVID's.
func TestVerifyMalformed(t *testing.T) {
	ca := newCA(t, "mesh.example")
	v := identity.Verifier{Bundles: testca.Source{ca}}
	for name, tc := range map[string]struct {
		option testca.Option
		detail string
	}{
		"no URI":                 {testca.NoURI, "no URI SAN"},
		"two URIs":               {testca.SecondURI, "2 URI SANs"},
		"the same URI twice":     {uris(web.String(), web.String()), "2 URI SANs"},
		"a URI of another kind":  {uris(web.String(), "https://mesh.example/"), "2 URI SANs"},
		"another scheme":         {uris("https://mesh.example/ns/demo/sa/web"), "no SPIFFE ID"},
		"a port":                 {uris("spiffe://mesh.example:443/ns/demo/sa/web"), "no SPIFFE ID"},
		"a query":                {uris("spiffe://mesh.example/ns/demo/sa/web?a=b"), "no SPIFFE ID"},
		"a fragment":             {uris("spiffe://mesh.example/ns/demo/sa/web#a"), "no SPIFFE ID"},
		"user information":       {uris("spiffe://me@mesh.example/ns/demo/sa/web"), "no SPIFFE ID"},
		"percent encoding":       {uris("spiffe://mesh.example/ns/demo/sa/w%65b"), "no SPIFFE ID"},
		"a dot segment":          {uris("spiffe://mesh.example/ns/demo/../web"), "no SPIFFE ID"},
		"an empty segment":       {uris("spiffe://mesh.example/ns//sa/web"), "no SPIFFE ID"},
		"a slash at the end":     {uris("spiffe://mesh.example/ns/demo/sa/web/"), "no SPIFFE ID"},
		"upper case in the host": {uris("spiffe://Mesh.example/ns/demo/sa/web"), "no SPIFFE ID"},
		"a trust domain's ID":    {uris("spiffe://mesh.example"), "no path"},
		"a CA":                   {testca.IsCA, "CA certificate"},
		"a CA by its constraints only": {testca.Change(func(c *x509.Certificate) { c.IsCA = true }),
			"CA certificate"},
		"keyCertSign":         {usage(x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign), "keyCertSign"},
		"cRLSign":             {usage(x509.KeyUsageDigitalSignature | x509.KeyUsageCRLSign), "cRLSign"},
		"no digitalSignature": {testca.NoDigitalSignature, "digitalSignature"},
		"no key usage":        {usage(0), "digitalSignature"},
		"for servers only":    {testca.ServerOnly, "clientAuth"},
		"for clients only":    {extUsage(x509.ExtKeyUsageClientAuth), "serverAuth"},
		"for any usage":       {testca.AnyUsage, "serverAuth"},
		"for something else":  {extUsage(x509.ExtKeyUsageEmailProtection), "serverAuth"},
		"for an unknown purpose": {testca.Change(func(c *x509.Certificate) {
			c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{{1, 2, 3}}
		}), "serverAuth"},
	} {
		t.Run(name, func(t *testing.T) {
			certs := chain(t, ca, web, tc.option)
			wantFailure(t, v, certs, web, identity.ReasonSVIDMalformed, append(at(certs[0]), tc.detail)...)
		})
	}
	t.Run("too many certificates", func(t *testing.T) {
		certs := chain(t, ca, web)
		for len(certs) < identity.MaxChain {
			certs = append(certs, ca.Intermediate)
		}
		if _, failure := v.Verify(certs, web); failure != nil {
			t.Errorf("at the limit: %v", failure)
		}
		certs = append(certs, ca.Intermediate)
		wantFailure(t, v, certs, web, identity.ReasonSVIDMalformed, "9 certificates")
	})
}

func wantFailure(t *testing.T, v identity.Verifier, certs []*x509.Certificate, expect spiffeid.ID, reason identity.Reason, details ...string) *identity.Failure {
	t.Helper()
	peer, failure := v.Verify(certs, expect)
	if failure == nil {
		t.Fatalf("accepted %s, want %s", peer.ID, reason)
	}
	if failure.Reason != reason {
		t.Errorf("got %v, want %s", failure, reason)
	}
	if !peer.ID.IsZero() || peer.Certificate != nil || peer.Path != nil {
		t.Errorf("a refused peer has values: %+v", peer)
	}
	claimed := ""
	if len(certs) > 0 && len(certs[0].URIs) > 0 {
		claimed = certs[0].URIs[0].String()
	}
	if !strings.HasPrefix(claimed, strings.TrimSuffix(failure.Claimed, "…")) || (failure.Claimed == "") != (claimed == "") || len(failure.Claimed) > 210 {
		t.Errorf("the peer claims to be %q, want %q", failure.Claimed, claimed)
	}
	for _, d := range details {
		if !strings.Contains(failure.Detail, d) {
			t.Errorf("detail %q lacks %q", failure.Detail, d)
		}
	}
	return failure
}

// The other reasons, each with the certificate at fault.
func TestVerifyRefuses(t *testing.T) {
	mesh, partner, foreign := newCA(t, "mesh.example"), newCA(t, "other.example"), newCA(t, "mesh.example")
	v := identity.Verifier{Bundles: testca.Source{mesh, partner}}

	t.Run("no certificate", func(t *testing.T) {
		wantFailure(t, v, nil, web, identity.ReasonNoCertificate)
		wantFailure(t, v, []*x509.Certificate{}, web, identity.ReasonNoCertificate)
	})
	t.Run("not yet valid", func(t *testing.T) {
		certs := chain(t, mesh, web, testca.NotYetValid, testca.ValidFor(2*time.Hour))
		wantFailure(t, v, certs, web, identity.ReasonCertificateNotYetValid, at(certs[0])...)
	})
	t.Run("expired", func(t *testing.T) {
		certs := chain(t, mesh, web, testca.Expired)
		wantFailure(t, v, certs, web, identity.ReasonCertificateExpired, at(certs[0])...)
	})
	t.Run("unknown trust domain", func(t *testing.T) {
		certs := chain(t, partner, other)
		f := wantFailure(t, identity.Verifier{Bundles: testca.Source{mesh}}, certs, other, identity.ReasonTrustDomainUnknown, append(at(certs[0]), "other.example")...)
		if !errors.Is(f, identity.ErrUnknownTrustDomain) {
			t.Errorf("%v does not wrap ErrUnknownTrustDomain", f)
		}
	})
	t.Run("no bundles at all", func(t *testing.T) {
		wantFailure(t, identity.Verifier{}, chain(t, mesh, web), web, identity.ReasonTrustDomainUnknown)
	})
	t.Run("a source that answers with another domain's bundle", func(t *testing.T) {
		wrong := bundleFunc(func(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
			return testca.Source{mesh, partner}.Bundle(other.TrustDomain())
		})
		wantFailure(t, identity.Verifier{Bundles: wrong}, chain(t, mesh, web), web, identity.ReasonTrustDomainUnknown)
	})
	t.Run("a source that answers with nothing", func(t *testing.T) {
		nothing := bundleFunc(func(spiffeid.TrustDomain) (*x509bundle.Bundle, error) { return nil, nil })
		wantFailure(t, identity.Verifier{Bundles: nothing}, chain(t, mesh, web), web, identity.ReasonTrustDomainUnknown)
	})
	t.Run("an empty bundle", func(t *testing.T) {
		empty := bundleFunc(func(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) { return x509bundle.New(td), nil })
		wantFailure(t, identity.Verifier{Bundles: empty}, chain(t, mesh, web), web, identity.ReasonChainValidationFailed)
	})
	t.Run("a root of the same name", func(t *testing.T) {
		certs := chain(t, foreign, web)
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed, append(at(certs[0]), at(certs[1])...)...)
	})
	t.Run("signed by the authority of another trusted domain", func(t *testing.T) {
		wantFailure(t, v, chain(t, partner, web), web, identity.ReasonChainValidationFailed)
		wantFailure(t, v, chain(t, mesh, other), other, identity.ReasonChainValidationFailed)
	})
	t.Run("missing intermediate", func(t *testing.T) {
		certs := chain(t, mesh, web, testca.WithoutIntermediate)
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed, append(at(certs[0]), "no intermediate", mesh.Intermediate.Subject.CommonName)...)
	})
	t.Run("an intermediate of somebody else", func(t *testing.T) {
		certs := chain(t, mesh, web)
		wantFailure(t, v, []*x509.Certificate{certs[0], foreign.Intermediate}, web, identity.ReasonChainValidationFailed)
	})
	t.Run("expired intermediate", func(t *testing.T) {
		certs := chain(t, signCA(t, mesh, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), web)
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed, append(at(certs[1]), "the intermediate", "expired")...)
	})
	t.Run("intermediate not yet valid", func(t *testing.T) {
		certs := chain(t, signCA(t, mesh, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) }), web)
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed, append(at(certs[1]), "the intermediate")...)
	})
	t.Run("intermediate that is no CA", func(t *testing.T) {
		certs := chain(t, signCA(t, mesh, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, 0 }), web)
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed)
	})
	t.Run("intermediate that may not sign", func(t *testing.T) {
		certs := chain(t, signCA(t, mesh, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), web)
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed)
	})
	t.Run("intermediate for servers only", func(t *testing.T) {
		certs := chain(t, signCA(t, mesh, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), web)
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed, append(at(certs[1]), "clientAuth")...)
	})
	t.Run("intermediate below one that may sign leaves only", func(t *testing.T) {
		template := &x509.Certificate{NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, Subject: pkix.Name{CommonName: "too deep"}}
		c, key, err := mesh.Sign(template, false)
		if err != nil {
			t.Fatal(err)
		}
		certs := append(chain(t, mesh.With(c, key), web), mesh.Intermediate)
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed)
	})
	t.Run("intermediate constrained to another domain", func(t *testing.T) {
		ca := signCA(t, mesh, func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.example"} })
		wantFailure(t, v, chain(t, ca, web), web, identity.ReasonChainValidationFailed)
	})
	t.Run("a leaf signed by a leaf", func(t *testing.T) {
		s, err := mesh.SVID(db)
		if err != nil {
			t.Fatal(err)
		}
		certs := append(chain(t, mesh.With(s.Certificates[0], s.Key), web), mesh.Intermediate)
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed)
	})
	t.Run("expired root", func(t *testing.T) {
		late := identity.Verifier{Bundles: v.Bundles, Now: func() time.Time { return mesh.Root.NotAfter.Add(time.Minute) }}
		ca := signCA(t, mesh, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(72 * time.Hour) })
		certs := chain(t, ca, web, testca.ValidFor(48*time.Hour))
		wantFailure(t, late, certs, web, identity.ReasonChainValidationFailed, append(at(mesh.Root), "the root", "expired")...)
	})
	t.Run("a leaf that is itself a root", func(t *testing.T) {
		certs := chain(t, mesh, web)
		pinned := bundleFunc(func(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
			return x509bundle.FromX509Authorities(td, certs[:1]), nil
		})
		wantFailure(t, identity.Verifier{Bundles: pinned}, certs, web, identity.ReasonChainValidationFailed, at(certs[0])...)
	})
	t.Run("a critical extension that nobody knows", func(t *testing.T) {
		certs := chain(t, mesh, web, testca.Change(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}))
		wantFailure(t, v, certs, web, identity.ReasonChainValidationFailed)
	})
	t.Run("a changed signature", func(t *testing.T) {
		certs := chain(t, mesh, web)
		der := append([]byte(nil), certs[0].Raw...)
		der[len(der)-1] ^= 1
		forged, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		wantFailure(t, v, []*x509.Certificate{forged, certs[1]}, web, identity.ReasonChainValidationFailed)
	})
	t.Run("another identity", func(t *testing.T) {
		certs := chain(t, mesh, db)
		wantFailure(t, v, certs, web, identity.ReasonIdentityMismatch, append(at(certs[0]), web.String(), db.String())...)
	})
	t.Run("the same path in another trust domain", func(t *testing.T) {
		wantFailure(t, v, chain(t, partner, other), web, identity.ReasonIdentityMismatch)
	})
}

type bundleFunc func(spiffeid.TrustDomain) (*x509bundle.Bundle, error)

func (f bundleFunc) Bundle(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) { return f(td) }

func TestVerifyRevoked(t *testing.T) {
	mesh := newCA(t, "mesh.example")
	certs := chain(t, mesh, web)
	deny := func(c *x509.Certificate) identity.Verifier {
		return identity.Verifier{Bundles: testca.Source{mesh}, Denied: func(got *x509.Certificate, _ spiffeid.ID) (string, bool) {
			return "it was stolen", got.SerialNumber.Cmp(c.SerialNumber) == 0
		}}
	}
	for name, c := range map[string]*x509.Certificate{"leaf": certs[0], "intermediate": certs[1], "root": mesh.Root} {
		t.Run("by serial number of the "+name, func(t *testing.T) {
			wantFailure(t, deny(c), certs, web, identity.ReasonRevoked, append(at(c), "it was stolen")...)
		})
	}
	t.Run("another serial number", func(t *testing.T) {
		if _, f := deny(chain(t, mesh, web)[0]).Verify(certs, web); f != nil {
			t.Error(f)
		}
	})
	t.Run("by identity", func(t *testing.T) {
		v := identity.Verifier{Bundles: testca.Source{mesh}, Denied: func(_ *x509.Certificate, id spiffeid.ID) (string, bool) {
			return "SPIFFE ID", id == web
		}}
		wantFailure(t, v, certs, web, identity.ReasonRevoked, "SPIFFE ID")
		if _, f := v.Verify(chain(t, mesh, db), db); f != nil {
			t.Error(f)
		}
	})
	// An intermediate that is issued anew with its old key does not suffer from
	// the old certificate, whichever of the two a peer sends first.
	t.Run("one of two paths", func(t *testing.T) {
		template := &x509.Certificate{Subject: pkix.Name{CommonName: "renewed"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
		old, key, err := mesh.Sign(template, true)
		if err != nil {
			t.Fatal(err)
		}
		renewed := resign(t, mesh, template, key)
		leaf := chain(t, mesh.With(old, key), web)[0]
		v := deny(old)
		for _, sent := range [][]*x509.Certificate{{leaf, old, renewed}, {leaf, renewed, old}} {
			if _, f := v.Verify(sent, web); f != nil {
				t.Error(f)
			}
		}
		wantFailure(t, v, []*x509.Certificate{leaf, old}, web, identity.ReasonRevoked)
	})
}

// resign makes a certificate for an existing key, by the root.
func resign(t *testing.T, ca *testca.CA, template *x509.Certificate, key crypto.Signer) *x509.Certificate {
	t.Helper()
	c, err := ca.SignKey(template, key.Public(), true)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A peer with every fault hears of the first; each one mended shows the next.
func TestVerifyOrder(t *testing.T) {
	mesh, foreign := newCA(t, "mesh.example"), newCA(t, "mesh.example")
	denied := func(*x509.Certificate, spiffeid.ID) (string, bool) { return "denied", true }
	nobody := bundleFunc(func(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) { return nil, identity.ErrUnknownTrustDomain })

	v := identity.Verifier{Bundles: nobody, Denied: denied}
	early := []testca.Option{testca.NotYetValid, testca.ValidFor(2 * time.Hour)}
	wantFailure(t, v, nil, db, identity.ReasonNoCertificate)
	wantFailure(t, v, chain(t, foreign, web, append(early, testca.SecondURI)...), db, identity.ReasonSVIDMalformed)
	wantFailure(t, v, chain(t, foreign, web, testca.Expired, testca.SecondURI), db, identity.ReasonSVIDMalformed)
	wantFailure(t, v, chain(t, foreign, web, early...), db, identity.ReasonCertificateNotYetValid)
	wantFailure(t, v, chain(t, foreign, web, testca.Expired), db, identity.ReasonCertificateExpired)
	wantFailure(t, v, chain(t, foreign, web), db, identity.ReasonTrustDomainUnknown)
	v.Bundles = testca.Source{mesh}
	wantFailure(t, v, chain(t, foreign, web), db, identity.ReasonChainValidationFailed)
	wantFailure(t, v, chain(t, mesh, web), db, identity.ReasonRevoked)
	v.Denied = nil
	wantFailure(t, v, chain(t, mesh, web), db, identity.ReasonIdentityMismatch)
	if _, f := v.Verify(chain(t, mesh, web), web); f != nil {
		t.Error(f)
	}
}

// RFC 5280 4.1.2.5: both ends of the validity belong to it.
func TestVerifyTimeBounds(t *testing.T) {
	mesh := newCA(t, "mesh.example")
	certs := chain(t, mesh, web)
	leaf := certs[0]
	for _, tc := range []struct {
		now  time.Time
		want identity.Reason
	}{
		{leaf.NotBefore.Add(-time.Nanosecond), identity.ReasonCertificateNotYetValid},
		{leaf.NotBefore, ""},
		{leaf.NotAfter, ""},
		{leaf.NotAfter.Add(time.Nanosecond), identity.ReasonCertificateExpired},
	} {
		// The CA's own certificates begin at about the leaf's time.
		v := identity.Verifier{Bundles: testca.Source{mesh}, Now: func() time.Time { return tc.now }}
		_, f := v.Verify(certs, web)
		if f != nil && f.Reason == identity.ReasonChainValidationFailed && tc.want == "" {
			t.Fatalf("the test's CA is younger than its leaf: %v", f)
		}
		var got identity.Reason
		if f != nil {
			got = f.Reason
		}
		if got != tc.want {
			t.Errorf("at %s: got %q, want %q", tc.now, got, tc.want)
		}
	}
}

// A session lives no longer than what its peer's identity rests on.
func TestVerifyExpiry(t *testing.T) {
	mesh := newCA(t, "mesh.example")
	ca := signCA(t, mesh, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Minute) })
	certs := chain(t, ca, web)
	peer, f := identity.Verifier{Bundles: testca.Source{mesh}}.Verify(certs, web)
	if f != nil {
		t.Fatal(f)
	}
	if !peer.Expiry.Equal(certs[1].NotAfter) {
		t.Errorf("expiry %s, the intermediate ends at %s", peer.Expiry, certs[1].NotAfter)
	}
}

// Two roots of one domain: a rotation restarts nothing.
func TestVerifyTwoRoots(t *testing.T) {
	before, after := newCA(t, "mesh.example"), newCA(t, "mesh.example")
	v := identity.Verifier{Bundles: testca.Source{before, after}}
	for _, ca := range []*testca.CA{before, after} {
		if _, f := v.Verify(chain(t, ca, web), web); f != nil {
			t.Error(f)
		}
	}
}

// What a peer puts into a certificate does not flood or forge a log line.
func TestDetailIsBounded(t *testing.T) {
	mesh := newCA(t, "mesh.example")
	v := identity.Verifier{Bundles: testca.Source{mesh}}
	certs := chain(t, mesh, web, testca.NoURI, testca.Change(func(c *x509.Certificate) {
		c.Subject.CommonName = "a\n\x1b[31m" + strings.Repeat("x", 50_000)
	}))
	f := wantFailure(t, v, certs, web, identity.ReasonSVIDMalformed)
	if len(f.Detail) > 1000 || strings.ContainsAny(f.Detail, "\n\x1b") {
		t.Errorf("%d bytes: %.200q", len(f.Detail), f.Detail)
	}
	long := "spiffe://mesh.example/" + strings.Repeat("x", 3000)
	f = wantFailure(t, v, chain(t, mesh, web, uris(long)), web, identity.ReasonSVIDMalformed)
	if len(f.Detail) > 1000 {
		t.Errorf("%d bytes: %.200q", len(f.Detail), f.Detail)
	}
	f = wantFailure(t, v, chain(t, mesh, web, uris(long[:2000])), web, identity.ReasonIdentityMismatch)
	if len(f.Detail) > 1000 {
		t.Errorf("%d bytes: %.200q", len(f.Detail), f.Detail)
	}
}

func TestReasons(t *testing.T) {
	want := []identity.Reason{
		"timeout", "tls_protocol", "no_certificate", "svid_malformed", "certificate_not_yet_valid", "certificate_expired",
		"trust_domain_unknown", "chain_validation_failed", "revoked", "identity_mismatch", "refused_by_peer",
	}
	if diff := cmp.Diff(want, identity.Reasons()); diff != "" {
		t.Error(diff)
	}
	cause := errors.New("cause")
	f := &identity.Failure{Reason: identity.ReasonTimeout, Detail: "too slow", Err: cause}
	if !errors.Is(f, cause) || f.Error() != "timeout: too slow" {
		t.Errorf("%v, wraps its cause: %t", f, errors.Is(f, cause))
	}
}

// FuzzVerify feeds what crypto/x509 parses; nothing of it may be accepted, since
// the fuzzer has no key, nor panic.
func FuzzVerify(f *testing.F) {
	mesh := newCA(f, "mesh.example")
	good := chain(f, mesh, web)
	for _, o := range []testca.Option{testca.NoURI, testca.SecondURI, testca.IsCA, testca.Expired, testca.AnyUsage} {
		f.Add(chain(f, mesh, web, o)[0].Raw, mesh.Intermediate.Raw)
	}
	f.Add(good[0].Raw, good[1].Raw)
	v := identity.Verifier{Bundles: testca.Source{mesh}, Denied: func(*x509.Certificate, spiffeid.ID) (string, bool) { return "", false }}
	f.Fuzz(func(t *testing.T, leaf, issuer []byte) {
		l, err := x509.ParseCertificate(leaf)
		if err != nil {
			return
		}
		certs := []*x509.Certificate{l}
		if i, err := x509.ParseCertificate(issuer); err == nil {
			certs = append(certs, i)
		}
		peer, failure := v.Verify(certs, spiffeid.ID{})
		switch {
		case failure == nil && !l.Equal(good[0]):
			t.Fatalf("accepted %s", peer.ID)
		case failure != nil && (failure.Reason == "" || failure.Detail == ""):
			t.Fatalf("refused without a word: %+v", failure)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	mesh := newCA(b, "mesh.example")
	certs := chain(b, mesh, web)
	v := identity.Verifier{Bundles: testca.Source{mesh}, Denied: func(*x509.Certificate, spiffeid.ID) (string, bool) { return "", false }}
	b.ReportAllocs()
	for b.Loop() {
		if _, f := v.Verify(certs, web); f != nil {
			b.Fatal(f)
		}
	}
}
