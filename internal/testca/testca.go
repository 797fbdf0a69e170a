// SPDX-License-Identifier: Apache-2.0

// Package testca makes the certificates that tests need: good ones, and ones
// that are wrong in one way each, as no issuer would make them. It writes no
// file and is not for production.
package testca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
)

// CA is a root with an intermediate.
type CA struct {
	TrustDomain  spiffeid.TrustDomain
	Root         *x509.Certificate
	Intermediate *x509.Certificate

	key crypto.Signer // the intermediate's
}

// New makes a CA of a trust domain.
func New(trustDomain string) (*CA, error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil, err
	}
	rootKey, root, err := signed(&x509.Certificate{
		Subject:  pkix.Name{CommonName: "test root of " + trustDomain},
		NotAfter: time.Now().Add(24 * time.Hour),
		IsCA:     true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	if err != nil {
		return nil, err
	}
	return under(td, root, rootKey)
}

// Under makes a CA whose intermediate is signed by an existing root, as one
// that is read from an authority's directory.
func Under(td spiffeid.TrustDomain, root *x509.Certificate, rootKey crypto.Signer) (*CA, error) {
	return under(td, root, rootKey)
}

func under(td spiffeid.TrustDomain, root *x509.Certificate, rootKey crypto.Signer) (*CA, error) {
	key, intermediate, err := signed(&x509.Certificate{
		Subject:  pkix.Name{CommonName: "test intermediate of " + td.Name()},
		NotAfter: time.Now().Add(24 * time.Hour),
		IsCA:     true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign,
	}, root, rootKey)
	if err != nil {
		return nil, err
	}
	return &CA{TrustDomain: td, Root: root, Intermediate: intermediate, key: key}, nil
}

func signed(template, parent *x509.Certificate, by crypto.Signer) (crypto.Signer, *x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		return nil, nil, err
	}
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Hour)
	}
	if parent == nil {
		parent, by = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		return nil, nil, err
	}
	c, err := x509.ParseCertificate(der)
	return key, c, err
}

// Option makes a leaf wrong.
type Option func(*leaf)

type leaf struct {
	template            *x509.Certificate
	withoutIntermediate bool
}

// Expired ends a leaf's time a minute ago.
func Expired(l *leaf) { l.template.NotAfter = time.Now().Add(-time.Minute) }

// NotYetValid begins a leaf's time in an hour.
func NotYetValid(l *leaf) { l.template.NotBefore = time.Now().Add(time.Hour) }

// IsCA makes the leaf a CA.
func IsCA(l *leaf) {
	l.template.IsCA = true
	l.template.KeyUsage |= x509.KeyUsageCertSign
}

// NoURI takes the URI SAN away.
func NoURI(l *leaf) {
	l.template.URIs = nil
	l.template.DNSNames = []string{"web.demo.svc"}
}

// SecondURI adds another URI SAN.
func SecondURI(l *leaf) {
	u, _ := url.Parse("spiffe://" + l.template.URIs[0].Host + "/ns/other/sa/other")
	l.template.URIs = append(l.template.URIs, u)
}

// ServerOnly leaves clientAuth out of the extended key usage.
func ServerOnly(l *leaf) { l.template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }

// NoDigitalSignature takes digitalSignature out of the key usage.
func NoDigitalSignature(l *leaf) { l.template.KeyUsage = x509.KeyUsageKeyEncipherment }

// WithoutIntermediate sends the leaf alone.
func WithoutIntermediate(l *leaf) { l.withoutIntermediate = true }

// ValidFor sets how long a leaf is valid from now.
func ValidFor(d time.Duration) Option {
	return func(l *leaf) { l.template.NotAfter = time.Now().Add(d) }
}

// SVID issues a leaf for a SPIFFE ID.
func (ca *CA) SVID(id spiffeid.ID, options ...Option) (*identity.SVID, error) {
	l := leaf{template: &x509.Certificate{
		NotAfter:              time.Now().Add(time.Hour),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:                  []*url.URL{id.URL()},
	}}
	for _, o := range options {
		o(&l)
	}
	key, c, err := signed(l.template, ca.Intermediate, ca.key)
	if err != nil {
		return nil, fmt.Errorf("issue test certificate for %s: %w", id, err)
	}
	chain := []*x509.Certificate{c, ca.Intermediate}
	if l.withoutIntermediate {
		chain = chain[:1]
	}
	return &identity.SVID{ID: id, Certificates: chain, Key: key}, nil
}

// Source is an identity.Source of some CAs: the first issues, the roots of all
// are trusted.
type Source []*CA

// SVID is identity.Source's.
func (s Source) SVID(_ context.Context, id spiffeid.ID) (*identity.SVID, error) {
	return s[0].SVID(id)
}

// Bundle is identity.Source's.
func (s Source) Bundle(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b := x509bundle.New(td)
	for _, ca := range s {
		if ca.TrustDomain == td {
			b.AddX509Authority(ca.Root)
		}
	}
	if b.Empty() {
		return nil, identity.ErrUnknownTrustDomain
	}
	return b, nil
}

// Changed is identity.Source's: nothing ever does.
func (s Source) Changed() <-chan struct{} { return make(chan struct{}) }
