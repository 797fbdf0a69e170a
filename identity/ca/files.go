// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/culvert-mesh/culvert/internal/input"
)

// The files of an authority's directory.
const (
	rootCert         = "root.pem"
	rootKey          = "root.key" // may be taken away: nothing here needs it once there is an intermediate
	intermediateCert = "intermediate.pem"
	intermediateKey  = "intermediate.key"

	dirMode = 0o700
)

// Mends, as an operator would do them.
const (
	mendTogether     = "put the files back that were made together"
	mendIntermediate = "put it back, or make a new one with `ztunnel ca intermediate`"
	mendRoot         = "put the root certificate back that `ztunnel ca init` made"
	mendKey          = "put the key back that was made with the certificate"
)

// checkDir refuses a directory that others can enter.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return input.Unusable(dir, err)
	}
	if !info.IsDir() {
		return input.Wrong(dir, "name the authority's folder in identity.ca.dir", "is a file, where a folder belongs")
	}
	if m := info.Mode().Perm(); m&0o077 != 0 {
		return input.Wrong(dir, "chmod 700 "+dir, "has mode %04o and others can enter it", m)
	}
	return nil
}

func read(path string, secret bool) ([]byte, error) {
	f, err := input.Open(path, input.MaxPEM)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, input.Unusable(path, err)
	}
	if m := info.Mode().Perm(); secret && m&0o077 != 0 {
		return nil, input.Wrong(path, "chmod 600 "+path, "has mode %04o and others can read the key", m)
	}
	return input.All(f, input.MaxPEM)
}

// missing says whether an error is that a file is not there. A link that leads
// nowhere is there: what it should lead to is not to be made anew.
func missing(err error) bool {
	var e *input.Error
	if !errors.As(err, &e) || !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	there, err := exists(e.Path)
	return err == nil && !there
}

// noBlock says why there is no PEM block where one should be.
func noBlock(path, mend string, data []byte) error {
	switch {
	case len(bytes.TrimSpace(data)) == 0:
		return input.Wrong(path, mend, "is empty")
	case bytes.HasPrefix(bytes.TrimSpace(data), []byte("-----BEGIN ")):
		return input.Wrong(path, mend, "a PEM block is cut off, or broken")
	}
	return input.Wrong(path, mend, "no PEM block where one should begin")
}

func readCerts(path, mend string) ([]*x509.Certificate, error) {
	data, err := read(path, false)
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, noBlock(path, mend, data)
		}
		if block.Type != "CERTIFICATE" {
			return nil, input.Wrong(path, mend, "a PEM block of type %s, where only CERTIFICATE is taken", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, input.Wrong(path, mend, "certificate %d is broken (%v)", len(out)+1, err)
		}
		out = append(out, c)
		data = rest
	}
	if len(out) == 0 {
		return nil, noBlock(path, mend, nil)
	}
	return out, nil
}

func readKey(path string) (crypto.Signer, error) {
	data, err := read(path, true)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, noBlock(path, mendKey, data)
	}
	defer clear(block.Bytes)
	switch block.Type {
	case "PRIVATE KEY":
	case "ENCRYPTED PRIVATE KEY":
		return nil, input.Wrong(path, "decrypt it with `openssl pkcs8`", "is encrypted, and nobody is asked for a passphrase")
	case "EC PRIVATE KEY", "RSA PRIVATE KEY":
		return nil, input.Wrong(path, "convert it with `openssl pkcs8 -topk8 -nocrypt`", "a PEM block of type %s, where only PRIVATE KEY (PKCS #8) is taken", block.Type)
	default:
		return nil, input.Wrong(path, mendKey, "a PEM block of type %s, where only PRIVATE KEY (PKCS #8) is taken", block.Type)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, input.Wrong(path, mendKey, "the key is broken (%v)", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, input.Wrong(path, mendKey, "a key of type %T cannot sign", key)
	}
	return signer, nil
}

// readPair reads the intermediate and its key. With a file that is not there the
// error is missing.
func readPair(dir string) (pair, error) {
	certFile, keyFile := filepath.Join(dir, intermediateCert), filepath.Join(dir, intermediateKey)
	certs, err := readCerts(certFile, mendIntermediate)
	if err != nil {
		return pair{}, err
	}
	if len(certs) != 1 {
		return pair{}, input.Wrong(certFile, "leave the one there that belongs to "+intermediateKey, "holds %d certificates, one is expected", len(certs))
	}
	key, err := readKey(keyFile)
	if err != nil {
		return pair{}, err
	}
	if !belongs(key, certs[0]) {
		return pair{}, input.Wrong(keyFile, "put the pair back that was made together, or make a new one with `ztunnel ca intermediate`", "does not belong to %s", certFile)
	}
	return pair{certs[0], key}, nil
}

// readRoots reads the roots: one, or several while one follows another.
func readRoots(dir string) ([]*x509.Certificate, error) {
	path := filepath.Join(dir, rootCert)
	certs, err := readCerts(path, mendRoot)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		if !c.IsCA {
			return nil, input.Wrong(path, "leave only roots there", "%s is no CA certificate", c.Subject)
		}
	}
	return certs, nil
}

// readRoot reads the root's key, and says to which of the roots it belongs.
// Without the file the error is missing.
func readRoot(dir string, roots []*x509.Certificate) (pair, error) {
	path := filepath.Join(dir, rootKey)
	key, err := readKey(path)
	if err != nil {
		return pair{}, err
	}
	for _, c := range roots {
		if belongs(key, c) {
			return pair{c, key}, nil
		}
	}
	return pair{}, input.Wrong(path, "put the pair back that was made together, or take the key away", "does not belong to %s", filepath.Join(dir, rootCert))
}

func belongs(key crypto.Signer, c *x509.Certificate) bool {
	pub, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && pub.Equal(key.Public())
}

func writeCerts(path string, certs ...*x509.Certificate) error {
	var data []byte
	for _, c := range certs {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return write(path, data)
}

func writeKey(path string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode key: %w", err)
	}
	defer clear(der)
	data := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	defer clear(data)
	return write(path, data)
}

// write puts a whole file in place or none: a new one beside it, synced, and
// renamed over it.
func write(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name()) // gone already if the rename was made
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	_, err = f.Write(data)
	if serr := f.Sync(); err == nil {
		err = serr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes a rename last.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, input.Unusable(path, err)
	}
	return true, nil
}

// newKey makes a key on P-256: small, quick, and what every peer takes.
func newKey() (crypto.Signer, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return k, nil
}
