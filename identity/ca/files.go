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
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if m := info.Mode().Perm(); secret && m&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o and others can read the key: chmod 600 %s", path, m, path)
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are read: is it the right file?", path, info.Size(), maxFile)
	}
	return os.ReadFile(path)
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

// readPair reads a certificate and its key. With a missing file the error is
// fs.ErrNotExist.
func readPair(dir, cert, key string) (*x509.Certificate, crypto.Signer, error) {
	certs, err := readCerts(filepath.Join(dir, cert))
	if err != nil {
		return nil, nil, err
	}
	if len(certs) != 1 {
		return nil, nil, fmt.Errorf("%s: holds %d certificates, one is expected", filepath.Join(dir, cert), len(certs))
	}
	signer, err := readKey(filepath.Join(dir, key))
	if err != nil {
		return nil, nil, err
	}
	pub, ok := certs[0].PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(signer.Public()) {
		return nil, nil, fmt.Errorf("%s does not belong to %s: put the pair back that was made together", filepath.Join(dir, key), filepath.Join(dir, cert))
	}
	return certs[0], signer, nil
}

func writeCert(path string, c *x509.Certificate) error {
	return write(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
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
			err = fmt.Errorf("write %s: %w", path, errors.Join(err, os.Remove(f.Name())))
		}
	}()
	_, err = f.Write(data)
	if serr := f.Sync(); err == nil {
		err = serr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
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
