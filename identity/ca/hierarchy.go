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
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/internal/input"
)

// How long certificates live, and how far back they begin: clocks differ.
const (
	rootLife         = 10 * 365 * 24 * time.Hour
	intermediateLife = 365 * 24 * time.Hour
	backdate         = 5 * time.Minute
)

// pair is a CA certificate with its key.
type pair struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// pastHalf says whether c has lived half its life, which is when it is renewed.
func pastHalf(c *x509.Certificate, now time.Time) bool {
	return now.After(c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 2))
}

// Init makes a root and an intermediate in dir, which it creates. It refuses a
// directory that already has a root.
func Init(dir string, td spiffeid.TrustDomain, now time.Time) error {
	if td.IsZero() {
		return errors.New("make root: no trust domain is given")
	}
	if err := makeDir(dir); err != nil {
		return err
	}
	there, err := exists(filepath.Join(dir, rootCert))
	if err != nil {
		return fmt.Errorf("make root: %w", err)
	}
	if there {
		return fmt.Errorf("make root: %s is there already and is not overwritten", filepath.Join(dir, rootCert))
	}
	key, err := newKey()
	if err != nil {
		return err
	}
	cert, err := sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "Culvert root", Organization: []string{td.Name()}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(rootLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{td.ID().URL()},
	}, pair{key: key}, key.Public())
	if err != nil {
		return err
	}
	// The key first: a root without its key would be a dead end. What a crash
	// leaves behind the root, Open completes.
	if err := writeKey(filepath.Join(dir, rootKey), key); err != nil {
		return err
	}
	if err := writeCerts(filepath.Join(dir, rootCert), cert); err != nil {
		return err
	}
	return newIntermediate(dir, pair{cert, key}, td, now)
}

// NewIntermediate makes an authority for a node of the mesh: outDir, which is
// created where needed, gets the root's certificate without its key, and an
// intermediate of its own. One that is there is replaced only if it cannot be
// used or has lived half its life. outDir may be rootDir.
func NewIntermediate(rootDir, outDir string, td spiffeid.TrustDomain, now time.Time) error {
	roots, err := readRoots(rootDir)
	if err != nil {
		return fmt.Errorf("read root: %w", err)
	}
	root, err := readRoot(rootDir, roots)
	if missing(err) {
		return fmt.Errorf("read root: %w", input.Wrong(filepath.Join(rootDir, rootKey), "bring the root's key, which is needed to make an intermediate", "no such file or directory"))
	}
	if err != nil {
		return fmt.Errorf("read root: %w", err)
	}
	if err := checkDomain(filepath.Join(rootDir, rootCert), root.cert, td); err != nil {
		return err
	}
	if err := makeDir(outDir); err != nil {
		return err
	}
	theirs, err := readRoots(outDir)
	switch {
	case missing(err):
		if err := writeCerts(filepath.Join(outDir, rootCert), roots...); err != nil {
			return err
		}
		theirs = roots
	case err != nil:
		return fmt.Errorf("make intermediate: %w", err)
	case !slices.ContainsFunc(theirs, root.cert.Equal):
		return fmt.Errorf("make intermediate: %s has another root: append this one to it to trust both, or empty the directory", filepath.Join(outDir, rootCert))
	}
	if p, err := readPair(outDir); err == nil && checkIntermediate(outDir, p.cert, theirs, td, now) == nil && !pastHalf(p.cert, now) {
		return fmt.Errorf("make intermediate: %s is there already, is good until %s, and is not overwritten", filepath.Join(outDir, intermediateCert), p.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	return newIntermediate(outDir, root, td, now)
}

// newIntermediate makes an intermediate with a key of its own.
func newIntermediate(dir string, root pair, td spiffeid.TrustDomain, now time.Time) error {
	key, err := newKey()
	if err != nil {
		return err
	}
	cert, err := signIntermediate(root, key.Public(), td, now)
	if err != nil {
		return err
	}
	if err := writeKey(filepath.Join(dir, intermediateKey), key); err != nil {
		return err
	}
	return writeCerts(filepath.Join(dir, intermediateCert), cert)
}

// renewIntermediate makes a new certificate for the key that is there: only one
// file changes, so no crash leaves a pair that does not fit.
func renewIntermediate(dir string, root, old pair, td spiffeid.TrustDomain, now time.Time) (pair, error) {
	cert, err := signIntermediate(root, old.key.Public(), td, now)
	if err != nil {
		return pair{}, err
	}
	return pair{cert, old.key}, writeCerts(filepath.Join(dir, intermediateCert), cert)
}

// signIntermediate sets no name constraint, though X509-SVID 4.2 would let it
// say "of this trust domain only": rustls, and so Istio's ztunnel, refuses any
// chain that has one for URIs (RUSTSEC-2026-0098). That a domain's roots sign
// for no other domain is kept by whoever verifies.
func signIntermediate(root pair, pub crypto.PublicKey, td spiffeid.TrustDomain, now time.Time) (*x509.Certificate, error) {
	if !now.Before(root.cert.NotAfter) {
		return nil, fmt.Errorf("make intermediate: the root has expired at %s: a new root is needed on every node", root.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	return sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "Culvert intermediate", Organization: []string{td.Name()}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              earlier(now.Add(intermediateLife), root.cert.NotAfter),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true, // signs leaves only
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{td.ID().URL()},
	}, root, pub)
}

// checkIntermediate refuses one that would sign what no peer takes. It names the
// file that is to blame.
func checkIntermediate(dir string, c *x509.Certificate, roots []*x509.Certificate, td spiffeid.TrustDomain, now time.Time) error {
	certFile, rootFile := filepath.Join(dir, intermediateCert), filepath.Join(dir, rootCert)
	if !c.IsCA || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return input.Wrong(certFile, mendAnew, "is no CA certificate")
	}
	if err := checkTime(certFile, mendAnew, c, now); err != nil {
		return err
	}
	root := parent(c, roots)
	if root == nil {
		return input.Wrong(certFile, mendTogether, "does not chain to %s beside it", rootCert)
	}
	if err := checkTime(rootFile, "make a new root and new intermediates, and bring them to every node", root, now); err != nil {
		return err
	}
	if root.MaxPathLen == 0 && root.MaxPathLenZero {
		return input.Wrong(rootFile, "make a root without path length, or with 1", "has the path length 0 and lets no intermediate sign")
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	opts := x509.VerifyOptions{Roots: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	if _, err := c.Verify(opts); err != nil {
		return input.Wrong(certFile, mendTogether, "does not chain to %s beside it (%v)", rootCert, err)
	}
	return checkDomain(certFile, c, td)
}

const mendAnew = "make a new one with `ztunnel ca intermediate`"

// parent is the root that has signed c; nil: none.
func parent(c *x509.Certificate, roots []*x509.Certificate) *x509.Certificate {
	for _, r := range roots {
		if c.CheckSignatureFrom(r) == nil {
			return r
		}
	}
	return nil
}

// checkTime refuses a certificate that is not valid by now.
func checkTime(file, mend string, c *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(c.NotBefore):
		return input.Wrong(file, "set the clock of this machine right, or "+mend, "is not valid before %s", c.NotBefore.UTC().Format(time.RFC3339))
	case now.After(c.NotAfter):
		return input.Wrong(file, mend, "has expired at %s", c.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// checkDomain refuses a CA certificate that says it is of another trust domain.
func checkDomain(file string, c *x509.Certificate, td spiffeid.TrustDomain) error {
	if len(c.URIs) != 1 {
		return nil
	}
	if own, err := spiffeid.TrustDomainFromURI(c.URIs[0]); err == nil && own != td {
		return input.Wrong(file, "correct trustDomain (of ztunnel ca: --trust-domain), or use the directory of that domain", "is of trust domain %s, not %s", own, td)
	}
	return nil
}

// sign signs a certificate; by without a certificate: by itself.
func sign(template *x509.Certificate, by pair, pub crypto.PublicKey) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	template.SerialNumber = serial.Add(serial, big.NewInt(1)) // positive (RFC 5280 4.1.2.2)
	parent := by.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, by.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return c, nil
}

func makeDir(dir string) error {
	there, err := exists(dir)
	if err != nil {
		return err
	}
	if !there {
		if err := os.MkdirAll(dir, dirMode); err != nil {
			return fmt.Errorf("make CA directory: %w", err)
		}
	}
	return checkDir(dir)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
