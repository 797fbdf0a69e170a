// SPDX-License-Identifier: Apache-2.0

// Package testca makes the certificates that tests need: good ones, and ones
// that are wrong in one way each, as no issuer would make them. It
// writes no file but in WriteDir, needs no *testing.T, so that helper processes
// can use it, and is not for production.
package testca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
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

	key     crypto.Signer // the intermediate's
	rootKey crypto.Signer
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

// Below makes a CA whose intermediate is signed by the root of an authority's
// directory, which is left as it is.
func Below(dir, trustDomain string) (*CA, error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil, err
	}
	root, err := read(dir, "root.pem", x509.ParseCertificate)
	if err != nil {
		return nil, err
	}
	key, err := read(dir, "root.key", x509.ParsePKCS8PrivateKey)
	if err != nil {
		return nil, err
	}
	return under(td, root, key.(crypto.Signer))
}

func read[T any](dir, name string, parse func([]byte) (T, error)) (T, error) {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return *new(T), err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return *new(T), fmt.Errorf("%s holds no PEM block", name)
	}
	return parse(block.Bytes)
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
	return &CA{TrustDomain: td, Root: root, Intermediate: intermediate, key: key, rootKey: rootKey}, nil
}

func signed(template, parent *x509.Certificate, by crypto.Signer) (crypto.Signer, *x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if parent == nil {
		parent, by = template, key
	}
	c, err := signedKey(template, parent, key.Public(), by)
	return key, c, err
}

func signedKey(template, parent *x509.Certificate, key crypto.PublicKey, by crypto.Signer) (c *x509.Certificate, err error) {
	if template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		return nil, err
	}
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Hour)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, by)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
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

// AnyUsage has an extended key usage that stands for all others.
func AnyUsage(l *leaf) { l.template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }

// Change makes a leaf wrong in a way of the caller's.
func Change(f func(template *x509.Certificate)) Option {
	return func(l *leaf) { f(l.template) }
}

// ValidFor sets how long a leaf is valid from now.
func ValidFor(d time.Duration) Option {
	return func(l *leaf) { l.template.NotAfter = time.Now().Add(d) }
}

func newLeaf(uris []*url.URL, options []Option) *leaf {
	l := &leaf{template: &x509.Certificate{
		NotAfter:              time.Now().Add(time.Hour),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:                  uris,
	}}
	for _, o := range options {
		o(l)
	}
	return l
}

// SVID issues a leaf for a SPIFFE ID.
func (ca *CA) SVID(id spiffeid.ID, options ...Option) (*identity.SVID, error) {
	l := newLeaf([]*url.URL{id.URL()}, options)
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

// Sign makes a certificate, with its key, by the intermediate or by the root: a
// CA certificate that is wrong in a way of the caller's. Serial number and start
// are filled in.
func (ca *CA) Sign(template *x509.Certificate, byRoot bool) (*x509.Certificate, crypto.Signer, error) {
	parent, by := ca.Intermediate, ca.key
	if byRoot {
		parent, by = ca.Root, ca.rootKey
	}
	key, c, err := signed(template, parent, by)
	return c, key, err
}

// SignKey makes a certificate for a key that exists.
func (ca *CA) SignKey(template *x509.Certificate, key crypto.PublicKey, byRoot bool) (*x509.Certificate, error) {
	parent, by := ca.Intermediate, ca.key
	if byRoot {
		parent, by = ca.Root, ca.rootKey
	}
	return signedKey(template, parent, key, by)
}

// With is a CA that has the same root and signs by another intermediate.
func (ca *CA) With(intermediate *x509.Certificate, key crypto.Signer) *CA {
	other := *ca
	other.Intermediate, other.key = intermediate, key
	return &other
}

// WriteDir writes the CA's files into a new directory, as package identity/ca
// expects them.
func (ca *CA) WriteDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write test CA: %w", err)
	}
	for name, c := range map[string]*x509.Certificate{"root.pem": ca.Root, "intermediate.pem": ca.Intermediate} {
		block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		if err := os.WriteFile(filepath.Join(dir, name), block, 0o600); err != nil {
			return fmt.Errorf("write test CA: %w", err)
		}
	}
	for name, key := range map[string]crypto.Signer{"root.key": ca.rootKey, "intermediate.key": ca.key} {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return fmt.Errorf("write test CA: %w", err)
		}
		block := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		if err := os.WriteFile(filepath.Join(dir, name), block, 0o600); err != nil {
			return fmt.Errorf("write test CA: %w", err)
		}
	}
	return nil
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
