// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxChain is how many certificates a peer may send: a leaf and some
// intermediates. It keeps a peer from making us try hundreds of signatures.
const MaxChain = 8

// maxID is the length of a SPIFFE ID, in bytes, that everybody has to support
// and nobody may exceed (SPIFFE-ID, section 2.3).
const maxID = 2048

// Verifier checks the certificates that a peer presents. Its zero value refuses
// everybody, because it knows no roots.
type Verifier struct {
	Bundles BundleSource // nil: no trust domain is known
	// Denied says whether a certificate is revoked, and why. It is asked about
	// each certificate of the chain, the root too, with the leaf's identity: a
	// stolen intermediate goes with all that it has signed. nil: nothing is.
	Denied func(c *x509.Certificate, id spiffeid.ID) (why string, denied bool)
	Now    func() time.Time // nil: the clock
}

// Verify checks a chain, leaf first, by the rules for X.509-SVIDs (SPIFFE
// X509-SVID, sections 2 to 5), against the bundle of the leaf's own trust
// domain. expect is the identity the peer is known to have; zero: any. The
// first check that fails, in the order of the reasons, is the one returned; its
// detail names the certificate at fault.
func (v Verifier) Verify(chain []*x509.Certificate, expect spiffeid.ID) (Peer, *Failure) {
	if len(chain) == 0 {
		return Peer{}, &Failure{Reason: ReasonNoCertificate, Detail: "the peer sent no certificate"}
	}
	peer, failure := v.verify(chain, expect)
	if failure != nil && len(chain[0].URIs) > 0 {
		failure.Claimed = shorten(chain[0].URIs[0].String())
	}
	return peer, failure
}

func (v Verifier) verify(chain []*x509.Certificate, expect spiffeid.ID) (Peer, *Failure) {
	leaf := chain[0]
	if len(chain) > MaxChain {
		return Peer{}, fail(ReasonSVIDMalformed, leaf, nil, "a chain of %d certificates, at most %d are taken", len(chain), MaxChain)
	}
	id, err := svidID(leaf)
	if err != nil {
		return Peer{}, fail(ReasonSVIDMalformed, leaf, err, "%v", err)
	}
	now := time.Now()
	if v.Now != nil {
		now = v.Now()
	}
	if now.Before(leaf.NotBefore) {
		return Peer{}, fail(ReasonCertificateNotYetValid, leaf, nil, "it is %s; check both nodes' clocks", stamp(now))
	}
	if now.After(leaf.NotAfter) {
		return Peer{}, fail(ReasonCertificateExpired, leaf, nil, "it is %s", stamp(now))
	}
	roots, err := v.roots(id.TrustDomain())
	if err != nil {
		return Peer{}, fail(ReasonTrustDomainUnknown, leaf, err, "no roots are known for trust domain %s", id.TrustDomain())
	}
	paths, failure := findPaths(chain, roots, now)
	if failure != nil {
		return Peer{}, failure
	}
	path, failure := v.firstAllowed(paths, id)
	if failure != nil {
		return Peer{}, failure
	}
	if !expect.IsZero() && id != expect {
		return Peer{}, fail(ReasonIdentityMismatch, leaf, nil, "the peer is %s, the workload at this address is %s", cut(id.String()), cut(expect.String()))
	}
	peer := Peer{ID: id, Certificate: leaf, Path: path, Expiry: leaf.NotAfter}
	for _, c := range path[1:] {
		if c.NotAfter.Before(peer.Expiry) {
			peer.Expiry = c.NotAfter
		}
	}
	return peer, nil
}

// svidID checks that c may be an X.509-SVID's leaf and returns its SPIFFE ID.
// The sections are the standard's.
func svidID(c *x509.Certificate) (spiffeid.ID, error) {
	switch { // section 2
	case len(c.URIs) == 0:
		return spiffeid.ID{}, errors.New("no URI SAN: this is no SPIFFE certificate")
	case len(c.URIs) > 1:
		return spiffeid.ID{}, fmt.Errorf("%d URI SANs, an SVID has exactly one", len(c.URIs))
	}
	id, err := spiffeid.FromURI(c.URIs[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("the URI SAN is no SPIFFE ID: %w", err)
	}
	switch {
	case len(id.String()) > maxID:
		return spiffeid.ID{}, fmt.Errorf("the SPIFFE ID has %d bytes, at most %d are taken", len(id.String()), maxID)
	case id.Path() == "": // section 3.2
		return spiffeid.ID{}, errors.New("the SPIFFE ID has no path: it names a trust domain, not a workload")
	case c.IsCA: // section 4.1
		return spiffeid.ID{}, errors.New("the leaf is a CA certificate")
	case c.KeyUsage&x509.KeyUsageCertSign != 0: // section 4.3
		return spiffeid.ID{}, errors.New("the leaf's key usage has keyCertSign")
	case c.KeyUsage&x509.KeyUsageCRLSign != 0:
		return spiffeid.ID{}, errors.New("the leaf's key usage has cRLSign")
	case c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return spiffeid.ID{}, errors.New("the leaf's key usage lacks digitalSignature")
	case !bothEnds(c):
		return spiffeid.ID{}, errors.New("the leaf's extended key usage lacks serverAuth or clientAuth")
	}
	return id, nil
}

// bothEnds says whether c may be used at both ends of a connection. An extended
// key usage may be left out; where there is one it has both, and "any" stands
// for neither (section 4.4, which holds for signing certificates too).
func bothEnds(c *x509.Certificate) bool {
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 {
		return true
	}
	return slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) &&
		slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
}

func (v Verifier) roots(td spiffeid.TrustDomain) ([]*x509.Certificate, error) {
	if v.Bundles == nil {
		return nil, ErrUnknownTrustDomain
	}
	b, err := v.Bundles.Bundle(td)
	if err != nil {
		return nil, err
	}
	if b == nil || b.TrustDomain() != td { // roots that are not asked for are none
		return nil, ErrUnknownTrustDomain
	}
	return b.X509Authorities(), nil
}

// findPaths returns the ways from the leaf to a root, each of two certificates
// or more.
func findPaths(chain, roots []*x509.Certificate, now time.Time) ([][]*x509.Certificate, *Failure) {
	paths, err := chain[0].Verify(x509.VerifyOptions{
		Roots:         pool(roots),
		Intermediates: pool(chain[1:]),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // bothEnds is stricter
	})
	if err != nil {
		return nil, noPath(chain, roots, err)
	}
	var failure *Failure
	paths = slices.DeleteFunc(paths, func(path []*x509.Certificate) bool {
		f := checkPath(path)
		if failure == nil {
			failure = f
		}
		return f != nil
	})
	if len(paths) == 0 {
		return nil, failure
	}
	return paths, nil
}

// checkPath has what crypto/x509 leaves open.
func checkPath(path []*x509.Certificate) *Failure {
	if len(path) == 1 {
		return fail(ReasonChainValidationFailed, path[0], nil, "the leaf itself is among the roots: nobody has signed it")
	}
	for _, c := range path[1 : len(path)-1] {
		if !bothEnds(c) {
			return fail(ReasonChainValidationFailed, c, nil, "the intermediate's extended key usage lacks serverAuth or clientAuth")
		}
	}
	if root := path[len(path)-1]; !root.IsCA {
		return fail(ReasonChainValidationFailed, root, nil, "the root is no CA certificate")
	}
	return nil
}

// noPath says why there is no path, and names the certificate to look at.
func noPath(chain, roots []*x509.Certificate, err error) *Failure {
	leaf := chain[0]
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &invalid) && invalid.Cert != nil && invalid.Cert != leaf:
		role := "intermediate"
		if slices.ContainsFunc(roots, invalid.Cert.Equal) {
			role = "root"
		}
		return fail(ReasonChainValidationFailed, invalid.Cert, err, "the %s: %v", role, err)
	case len(chain) == 1:
		return fail(ReasonChainValidationFailed, leaf, err, "%v; the peer sent no intermediate, and its issuer %s is no root of its trust domain", err, cut(leaf.Issuer.String()))
	}
	last := chain[len(chain)-1]
	return fail(ReasonChainValidationFailed, leaf, err, "%v; the chain ends at %s, issued by %s", err, describe(last), cut(last.Issuer.String()))
}

// firstAllowed returns the first path on which nothing is revoked.
func (v Verifier) firstAllowed(paths [][]*x509.Certificate, id spiffeid.ID) ([]*x509.Certificate, *Failure) {
	if v.Denied == nil {
		return paths[0], nil
	}
	var failure *Failure
	for _, path := range paths {
		denied := slices.ContainsFunc(path, func(c *x509.Certificate) bool {
			why, denied := v.Denied(c, id)
			if denied && failure == nil {
				failure = fail(ReasonRevoked, c, nil, "%s", why)
			}
			return denied
		})
		if !denied {
			return path, nil
		}
	}
	return nil, failure
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

func fail(r Reason, c *x509.Certificate, err error, format string, args ...any) *Failure {
	return &Failure{Reason: r, Detail: fmt.Sprintf(format, args...) + " (certificate " + describe(c) + ")", Err: err}
}

// describe names a certificate for people: its URI or subject, its serial number
// as a deny list takes it, and its validity.
func describe(c *x509.Certificate) string {
	who := c.Subject.String()
	if len(c.URIs) > 0 {
		who = c.URIs[0].String()
	}
	return fmt.Sprintf("%s, serial %x, valid from %s to %s", cut(who), c.SerialNumber, stamp(c.NotBefore), stamp(c.NotAfter))
}

// cut quotes what comes from a peer, and keeps the log from being filled by it.
func cut(s string) string { return strconv.Quote(shorten(s)) }

func shorten(s string) string {
	const most = 200 // bytes
	if len(s) > most {
		s = s[:most] + "…"
	}
	return s
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
