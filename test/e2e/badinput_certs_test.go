// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// What is wrong with files of certificates and keys. A case of the ca is made in
// a copy of a good folder.

var wrongTrust = []badFile{
	{name: "an unknown key", text: "trust: []\ndeny: {serial: [1f]}\n"},
	{name: "a domain without roots", text: "trust:\n- {domain: partner.example}\n"},
	{name: "roots without a domain", text: "trust:\n- {roots: [partner.pem]}\n"},
	{name: "a domain twice", text: "trust:\n- {domain: partner.example, roots: [partner.pem]}\n- {domain: partner.example, roots: [partner.pem]}\n"},
	{name: "a domain that is an ID", text: "trust:\n- {domain: spiffe://partner.example, roots: [partner.pem]}\n"},
	{name: "a file of roots that is not there", text: "trust:\n- {domain: partner.example, roots: [none.pem]}\n"},
	{name: "a file of roots that is a folder", text: "trust:\n- {domain: partner.example, roots: [/]}\n"},
	{name: "a file of roots that is no PEM", text: "trust:\n- {domain: partner.example, roots: [workloads.yaml]}\n"},
	{name: "a serial number", text: "deny: {serials: [xyz]}\n"},
	{name: "a serial number that is too long", text: "deny: {serials: [1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f]}\n"},
	{name: "an ID of nobody", text: "deny: {ids: [cluster.local]}\n"},
	{name: "roots, empty", file: "partner.pem", text: ""},
	{name: "roots, cut off", file: "partner.pem", make: func(p string) error { return os.WriteFile(p, cut(rootOf(nil)), 0o600) }},
	{name: "roots, a key", file: "partner.pem", make: func(p string) error { _, key := authority(nil, nil); return os.WriteFile(p, key, 0o600) }},
	{name: "roots, no CA", file: "partner.pem", make: func(p string) error {
		return os.WriteFile(p, rootOf(func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = 0 }), 0o600)
	}},
	{name: "roots, a broken certificate", file: "partner.pem", text: "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n"},
	{name: "roots, something behind", file: "partner.pem", make: func(p string) error { return os.WriteFile(p, append(rootOf(nil), "and more\n"...), 0o600) }},
	{name: "roots, a named pipe", file: "partner.pem", make: wrongPlaces()[2].make},
}

var wrongAuthorities = []badFile{
	{name: "a file for the folder", make: func(dir string) error {
		return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600))
	}},
	{name: "a link to nowhere for the folder", make: func(dir string) error { return errors.Join(os.RemoveAll(dir), os.Symlink("nowhere", dir)) }},
	{name: "the folder with mode 0777", make: func(dir string) error { return os.Chmod(dir, 0o777) }},
	{name: "root.pem absent", make: without("root.pem"), when: atStart}, // later it is told in other words
	{name: "root.pem empty", make: holds("root.pem", nil)},
	{name: "root.pem without PEM", make: holds("root.pem", []byte("hello\n"))},
	{name: "root.pem cut off", make: change("root.pem", cut)},
	{name: "root.pem a key", make: from("root.pem", "intermediate.key")},
	{name: "root.pem a folder", make: func(dir string) error {
		return errors.Join(without("root.pem")(dir), os.Mkdir(filepath.Join(dir, "root.pem"), 0o700))
	}},
	{name: "root.pem a named pipe", make: func(dir string) error {
		return errors.Join(without("root.pem")(dir), wrongPlaces()[2].make(filepath.Join(dir, "root.pem")))
	}},
	{name: "root.pem a link to nowhere", make: func(dir string) error {
		return errors.Join(without("root.pem")(dir), os.Symlink("nowhere", filepath.Join(dir, "root.pem")))
	}},
	{name: "root.pem of another mesh", make: holds("root.pem", rootOf(nil))},
	{name: "root.pem not a CA", make: holds("root.pem", rootOf(func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = 0 }))},
	{name: "root.pem of 2 MiB", make: holds("root.pem", bytes.Repeat([]byte("x"), 2<<20))},
	{name: "root expired", make: made(func(c *x509.Certificate) { c.NotBefore, c.NotAfter = ago(48), ago(1) }, nil)},
	{name: "root not yet valid", make: made(func(c *x509.Certificate) { c.NotBefore = ago(-1) }, nil)},
	{name: "root with path length 0", make: made(func(c *x509.Certificate) { c.MaxPathLenZero = true }, nil)},
	{name: "intermediate.pem absent", make: without("intermediate.pem")},
	{name: "intermediate.pem empty", make: holds("intermediate.pem", nil)},
	{name: "intermediate.pem without PEM", make: holds("intermediate.pem", []byte("hello\n"))},
	{name: "intermediate.pem cut off", make: change("intermediate.pem", cut)},
	{name: "intermediate.pem a broken certificate", make: holds("intermediate.pem", []byte("-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n"))},
	{name: "intermediate.pem two certificates", make: change("intermediate.pem", func(b []byte) []byte { return append(b, b...) })},
	{name: "intermediate.pem a link to nowhere", make: func(dir string) error {
		return errors.Join(without("intermediate.pem")(dir), os.Symlink("nowhere", filepath.Join(dir, "intermediate.pem")))
	}},
	{name: "intermediate.pem the root", make: from("intermediate.pem", "root.pem")},
	{name: "intermediate expired", make: made(nil, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = ago(48), ago(1) })},
	{name: "intermediate not yet valid", make: made(nil, func(c *x509.Certificate) { c.NotBefore = ago(-1) })},
	{name: "intermediate not a CA", make: made(nil, func(c *x509.Certificate) { c.IsCA = false })},
	{name: "intermediate of another trust domain", make: made(nil, func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.example"}}
	})},
	{name: "intermediate of another root", make: func(dir string) error {
		root, err := os.ReadFile(filepath.Join(dir, "root.pem"))
		return errors.Join(err, made(nil, nil)(dir), holds("root.pem", root)(dir))
	}},
	{name: "intermediate.key absent", make: without("intermediate.key")},
	{name: "intermediate.key empty", make: holds("intermediate.key", nil)},
	{name: "intermediate.key without PEM", make: holds("intermediate.key", []byte("hello\n"))},
	{name: "intermediate.key cut off", make: change("intermediate.key", cut)},
	{name: "intermediate.key a certificate", make: from("intermediate.key", "intermediate.pem")},
	{name: "intermediate.key in another form", make: change("intermediate.key", func(b []byte) []byte {
		return bytes.ReplaceAll(b, []byte("PRIVATE KEY"), []byte("EC PRIVATE KEY"))
	})},
	{name: "intermediate.key encrypted", make: change("intermediate.key", func(b []byte) []byte {
		return bytes.ReplaceAll(b, []byte("PRIVATE KEY"), []byte("ENCRYPTED PRIVATE KEY"))
	})},
	{name: "intermediate.key of another certificate", make: func(dir string) error { _, key := authority(nil, nil); return holds("intermediate.key", key)(dir) }},
	{name: "intermediate.key with mode 0644", make: func(dir string) error { return os.Chmod(filepath.Join(dir, "intermediate.key"), 0o644) }},
	{name: "intermediate.key a named pipe", make: func(dir string) error {
		return errors.Join(without("intermediate.key")(dir), wrongPlaces()[2].make(filepath.Join(dir, "intermediate.key")))
	}},
	{name: "root.key of another root", make: func(dir string) error { _, key := authority(nil, nil); return holds("root.key", key)(dir) }, when: atStart},
	{name: "root.key with mode 0644", make: func(dir string) error {
		_, key := authority(nil, nil)
		return errors.Join(holds("root.key", key)(dir), os.Chmod(filepath.Join(dir, "root.key"), 0o644))
	}, when: atStart},
}

func ago(hours int) time.Time { return time.Now().Add(-time.Duration(hours) * time.Hour) }

func without(name string) func(string) error {
	return func(dir string) error { return os.Remove(filepath.Join(dir, name)) }
}

func holds(name string, data []byte) func(string) error {
	return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), data, 0o600) }
}

func change(name string, f func([]byte) []byte) func(string) error {
	return func(dir string) error {
		data, err := os.ReadFile(filepath.Join(dir, name))
		return errors.Join(err, holds(name, f(data))(dir))
	}
}

func from(name, other string) func(string) error {
	return func(dir string) error {
		data, err := os.ReadFile(filepath.Join(dir, other))
		return errors.Join(err, holds(name, data)(dir))
	}
}

func cut(data []byte) []byte { return data[:len(data)*2/3] }

// made replaces the folder's files by an authority that is wrong in one way.
func made(root, intermediate func(*x509.Certificate)) func(string) error {
	return func(dir string) error {
		certs, key := authority(root, intermediate)
		return errors.Join(
			holds("root.pem", certs[0])(dir), holds("intermediate.pem", certs[1])(dir), holds("intermediate.key", key)(dir))
	}
}

func rootOf(f func(*x509.Certificate)) []byte { certs, _ := authority(f, nil); return certs[0] }

// authority makes a root and an intermediate, and the intermediate's key.
func authority(root, intermediate func(*x509.Certificate)) (certs [2][]byte, key []byte) {
	var parent *x509.Certificate
	var by *ecdsa.PrivateKey
	for i, f := range []func(*x509.Certificate){root, intermediate} {
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: []string{"foreign root", "foreign intermediate"}[i]},
			NotBefore: ago(1), NotAfter: ago(-24),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		if f != nil {
			f(c)
		}
		own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		if parent == nil {
			parent, by = c, own
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, own.Public(), by)
		if err != nil {
			panic(err)
		}
		certs[i] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		if der, err = x509.MarshalPKCS8PrivateKey(own); err != nil {
			panic(err)
		}
		key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		parent, by = c, own
	}
	return certs, key
}
