// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// How long certificates live, and how far back they begin: clocks differ.
const (
	rootLife         = 10 * 365 * 24 * time.Hour
	intermediateLife = 365 * 24 * time.Hour
	backdate         = 5 * time.Minute
)

// Init makes a root and an intermediate in dir, which it creates. It refuses a
// directory that already has a root.
func Init(dir string, td spiffeid.TrustDomain, now time.Time) error {
	if err := os.MkdirAll(dir, dirMode); err != nil {
		return fmt.Errorf("make CA directory: %w", err)
	}
	if err := checkDir(dir); err != nil {
		return err
	}
	if there, err := exists(filepath.Join(dir, rootCert)); err != nil || there {
		return errors.Join(err, fmt.Errorf("make root: %s is there already and is not overwritten", filepath.Join(dir, rootCert)))
	}
	key, err := newKey()
	if err != nil {
		return err
	}
	root, err := sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "Culvert root", Organization: []string{td.Name()}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(rootLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{td.ID().URL()},
	}, nil, key.Public(), key)
	if err != nil {
		return err
	}
	// The key first: a root without its key would be a dead end.
	if err := writeKey(filepath.Join(dir, rootKey), key); err != nil {
		return err
	}
	if err := writeCert(filepath.Join(dir, rootCert), root); err != nil {
		return err
	}
	return newIntermediate(dir, root, key, td, now)
}

// NewIntermediate makes an authority for another node of the mesh: outDir gets
// the root's certificate, without its key, and an intermediate of its own.
func NewIntermediate(rootDir, outDir string, td spiffeid.TrustDomain, now time.Time) error {
	root, key, err := readPair(rootDir, rootCert, rootKey)
	if err != nil {
		return fmt.Errorf("read root: %w", err)
	}
	if err := os.MkdirAll(outDir, dirMode); err != nil {
		return fmt.Errorf("make CA directory: %w", err)
	}
	if err := checkDir(outDir); err != nil {
		return err
	}
	if there, err := exists(filepath.Join(outDir, intermediateCert)); err != nil || there {
		return errors.Join(err, fmt.Errorf("make intermediate: %s is there already and is not overwritten", filepath.Join(outDir, intermediateCert)))
	}
	if err := writeCert(filepath.Join(outDir, rootCert), root); err != nil {
		return err
	}
	return newIntermediate(outDir, root, key, td, now)
}

func newIntermediate(dir string, root *x509.Certificate, rootKey crypto.Signer, td spiffeid.TrustDomain, now time.Time) error {
	key, err := newKey()
	if err != nil {
		return err
	}
	cert, err := sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "Culvert intermediate", Organization: []string{td.Name()}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              earlier(now.Add(intermediateLife), root.NotAfter),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true, // signs leaves only
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{td.ID().URL()},
		PermittedURIDomains:   []string{td.Name()}, // and only of its trust domain
	}, root, key.Public(), rootKey)
	if err != nil {
		return err
	}
	if err := writeKey(filepath.Join(dir, intermediateKey), key); err != nil {
		return err
	}
	return writeCert(filepath.Join(dir, intermediateCert), cert)
}

// sign signs a certificate; parent nil: by itself.
func sign(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	template.SerialNumber = serial
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return c, nil
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
