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
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// The files of an authority's directory.
const (
	rootCert         = "root.pem"
	rootKey          = "root.key" // may be taken away: nothing here needs it once there is an intermediate
	intermediateCert = "intermediate.pem"
	intermediateKey  = "intermediate.key"

	dirMode  = 0o700
	fileMode = 0o600

	// maxFile bounds what is read of one file: 1 MiB.
	maxFile = 1 << 20
)

// checkDir refuses a directory that others can enter.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("open CA directory: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("open CA directory: %s is no directory", dir)
	}
	if m := info.Mode().Perm(); m&0o077 != 0 {
		return fmt.Errorf("open CA directory: %s has mode %04o and others can enter it: chmod 700 %s", dir, m, dir)
	}
	return nil
}

func read(path string, secret bool) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if m := info.Mode().Perm(); secret && m&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o and others can read the key: chmod 600 %s", path, m, path)
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are read: is it the right file?", path, info.Size(), maxFile)
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

func readCerts(path string) ([]*x509.Certificate, error) {
	data, err := read(path, false)
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, fmt.Errorf("%s: no PEM block where one should begin; it is to hold certificates", path)
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: a PEM block of type %q, only CERTIFICATE is taken", path, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, c)
		data = rest
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: holds no certificate", path)
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
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("%s: holds no PEM block of type PRIVATE KEY (PKCS #8)", path)
	}
	defer clear(block.Bytes)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: a key of type %T cannot sign", path, key)
	}
	return signer, nil
}

// readPair reads the intermediate and its key. With a missing file the error is
// fs.ErrNotExist.
func readPair(dir string) (pair, error) {
	certFile, keyFile := filepath.Join(dir, intermediateCert), filepath.Join(dir, intermediateKey)
	certs, err := readCerts(certFile)
	if err != nil {
		return pair{}, err
	}
	if len(certs) != 1 {
		return pair{}, fmt.Errorf("%s: holds %d certificates, one is expected", certFile, len(certs))
	}
	key, err := readKey(keyFile)
	if err != nil {
		return pair{}, err
	}
	if !belongs(key, certs[0]) {
		return pair{}, fmt.Errorf("%s does not belong to %s: put the pair back that was made together, or make a new one with `ztunnel ca intermediate`", keyFile, certFile)
	}
	return pair{certs[0], key}, nil
}

// readRoots reads the roots: one, or several while one follows another.
func readRoots(dir string) ([]*x509.Certificate, error) {
	path := filepath.Join(dir, rootCert)
	certs, err := readCerts(path)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		if !c.IsCA {
			return nil, fmt.Errorf("%s: %s is no CA certificate: only roots belong here", path, c.Subject)
		}
	}
	return certs, nil
}

// readRoot reads the root's key, and says to which of the roots it belongs.
// Without the file the error is fs.ErrNotExist.
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
	return pair{}, fmt.Errorf("%s does not belong to %s: put the pair back that was made together, or take the key away", path, filepath.Join(dir, rootCert))
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
	_, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// newKey makes a key on P-256: small, quick, and what every peer takes.
func newKey() (crypto.Signer, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return k, nil
}
