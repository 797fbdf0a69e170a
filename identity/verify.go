// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxChain is how many certificates a peer may send: a leaf and some
// intermediates.
const MaxChain = 8

// Verifier checks the certificates that a peer presents. The zero value of
// Denied denies nothing, that of Now is the clock.
type Verifier struct {
	Bundles BundleSource
	// Denied says whether a leaf is revoked, and why.
	Denied func(leaf *x509.Certificate, id spiffeid.ID) (why string, denied bool)
	Now    func() time.Time
}

// Verify checks a chain, leaf first, by the rules for X.509-SVIDs (SPIFFE
// X509-SVID, sections 4 and 5), against the bundle of the leaf's own trust
// domain. expect is the identity the peer is known to have; zero: any. The
// first check that fails, in the order of the reasons, is the one returned.
func (v Verifier) Verify(chain []*x509.Certificate, expect spiffeid.ID) (Peer, *Failure) {
	if len(chain) == 0 {
		return Peer{}, &Failure{Reason: ReasonNoCertificate, Detail: "the peer sent no certificate"}
	}
	leaf := chain[0]
	if len(chain) > MaxChain {
		return Peer{}, fail(ReasonSVIDMalformed, leaf, fmt.Sprintf("chain of %d certificates, at most %d are taken", len(chain), MaxChain))
	}
	id, err := svidID(leaf)
	if err != nil {
		return Peer{}, fail(ReasonSVIDMalformed, leaf, err.Error())
	}
	now := time.Now()
	if v.Now != nil {
		now = v.Now()
	}
	if now.Before(leaf.NotBefore) {
		return Peer{}, fail(ReasonCertificateNotYetValid, leaf, fmt.Sprintf("valid from %s, it is %s; check both nodes' clocks", stamp(leaf.NotBefore), stamp(now)))
	}
	if now.After(leaf.NotAfter) {
		return Peer{}, fail(ReasonCertificateExpired, leaf, fmt.Sprintf("valid until %s, it is %s", stamp(leaf.NotAfter), stamp(now)))
	}
	bundle, err := v.Bundles.Bundle(id.TrustDomain())
	if err != nil {
		f := fail(ReasonTrustDomainUnknown, leaf, fmt.Sprintf("no roots are known for trust domain %s", id.TrustDomain()))
		f.Err = err
		return Peer{}, f
	}
	if err := verifyChain(chain, bundle.X509Authorities(), now); err != nil {
		f := fail(ReasonChainValidationFailed, leaf, chainDetail(chain, err, now))
		f.Err = err
		return Peer{}, f
	}
	if v.Denied != nil {
		if why, denied := v.Denied(leaf, id); denied {
			return Peer{}, fail(ReasonRevoked, leaf, why)
		}
	}
	if !expect.IsZero() && id != expect {
		return Peer{}, fail(ReasonIdentityMismatch, leaf, fmt.Sprintf("the peer is %s, the workload at this address is %s", id, expect))
	}
	return Peer{ID: id, Certificate: leaf, Expiry: leaf.NotAfter}, nil
}

// oidSAN is the subject alternative name extension, RFC 5280 section 4.2.1.6.
var oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}

// svidID checks that c may be an X.509-SVID's leaf and returns its SPIFFE ID.
func svidID(c *x509.Certificate) (spiffeid.ID, error) {
	switch {
	case len(c.URIs) == 0:
		return spiffeid.ID{}, fmt.Errorf("no URI SAN: this is no SPIFFE certificate")
	case len(c.URIs) > 1:
		return spiffeid.ID{}, fmt.Errorf("%d URI SANs, an SVID has exactly one", len(c.URIs))
	}
	id, err := spiffeid.FromURI(c.URIs[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("URI SAN %q is no SPIFFE ID: %w", c.URIs[0], err)
	}
	switch {
	case id.Path() == "":
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %s has no path: it names a trust domain, not a workload", id)
	case c.IsCA:
		return spiffeid.ID{}, fmt.Errorf("the leaf is a CA certificate")
	case c.KeyUsage&x509.KeyUsageCertSign != 0:
		return spiffeid.ID{}, fmt.Errorf("the leaf's key usage has keyCertSign")
	case c.KeyUsage&x509.KeyUsageCRLSign != 0:
		return spiffeid.ID{}, fmt.Errorf("the leaf's key usage has cRLSign")
	case c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return spiffeid.ID{}, fmt.Errorf("the leaf's key usage lacks digitalSignature")
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 {
		var server, client bool
		for _, u := range c.ExtKeyUsage {
			server = server || u == x509.ExtKeyUsageServerAuth || u == x509.ExtKeyUsageAny
			client = client || u == x509.ExtKeyUsageClientAuth || u == x509.ExtKeyUsageAny
		}
		if !server || !client {
			return spiffeid.ID{}, fmt.Errorf("the leaf's extended key usage lacks serverAuth or clientAuth")
		}
	}
	return id, nil
}

func verifyChain(chain, roots []*x509.Certificate, now time.Time) error {
	rootPool, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range roots {
		rootPool.AddCert(r)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	leaf := chain[0]
	// A SAN extension is critical where the subject is empty, and Go leaves
	// it unhandled when it holds nothing but a URI that it does not check.
	if len(leaf.UnhandledCriticalExtensions) > 0 {
		var rest []asn1.ObjectIdentifier
		for _, oid := range leaf.UnhandledCriticalExtensions {
			if !oid.Equal(oidSAN) {
				rest = append(rest, oid)
			}
		}
		c := *leaf
		c.UnhandledCriticalExtensions = rest
		leaf = &c
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots:         rootPool,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	return err
}

// chainDetail says which certificate of a chain is at fault.
func chainDetail(chain []*x509.Certificate, err error, now time.Time) string {
	for _, c := range chain[1:] {
		switch {
		case now.After(c.NotAfter):
			return fmt.Sprintf("intermediate %s is valid until %s", name(c), stamp(c.NotAfter))
		case now.Before(c.NotBefore):
			return fmt.Sprintf("intermediate %s is valid from %s", name(c), stamp(c.NotBefore))
		}
	}
	if len(chain) == 1 {
		return fmt.Sprintf("%v; the peer sent no intermediate, and its issuer %q is no root of its trust domain", err, chain[0].Issuer)
	}
	last := chain[len(chain)-1]
	return fmt.Sprintf("%v; the chain ends at %s, issued by %q", err, name(last), last.Issuer)
}

func fail(r Reason, c *x509.Certificate, detail string) *Failure {
	return &Failure{Reason: r, Detail: detail + " (certificate " + name(c) + ")"}
}

// name names a certificate for people: its URI or subject, and its serial
// number. What comes from a peer is cut.
func name(c *x509.Certificate) string {
	const most = 200 // bytes
	who := c.Subject.String()
	if len(c.URIs) > 0 {
		who = c.URIs[0].String()
	}
	if len(who) > most {
		who = who[:most] + "…"
	}
	return fmt.Sprintf("%q serial %x", who, c.SerialNumber)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
