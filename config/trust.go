// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config/strict"
	"github.com/culvert-mesh/culvert/internal/input"
)

// Trust is the content of a trust file: roots beside those of the node's own
// authority, and who is not trusted any more.
type Trust struct {
	// Roots by trust domain. The mesh's own domain may be among them: during a
	// rotation the old and the new root are both trusted.
	Roots map[spiffeid.TrustDomain][]*x509.Certificate
	// DeniedSerials are serial numbers of leaves, in lower-case hexadecimal
	// without colons or leading zeros.
	DeniedSerials []string
	DeniedIDs     []spiffeid.ID
	// Files are the PEM files that it names.
	Files []string
}

// Denied says whether a leaf is on the deny list, and why. It fits
// identity.Verifier.Denied.
func (t *Trust) Denied(leaf *x509.Certificate, id spiffeid.ID) (string, bool) {
	if slices.Contains(t.DeniedIDs, id) {
		return "SPIFFE ID " + id.String() + " is on the deny list", true
	}
	if leaf != nil && leaf.SerialNumber != nil && len(t.DeniedSerials) > 0 {
		if serial := leaf.SerialNumber.Text(16); slices.Contains(t.DeniedSerials, serial) {
			return "serial number " + serial + " is on the deny list", true
		}
	}
	return "", false
}

// ParseTrust reads data as the trust file at path, and the PEM files that it names:
//
//	trust:
//	  - domain: partner.example
//	    roots: [partner-root.pem]      # relative to the trust file
//	deny:
//	  serials: [3f:2a:9c]
//	  ids: [spiffe://cluster.local/ns/demo/sa/old]
//
// Where it fails, what is returned beside the error has the Files that were come
// upon, and nothing else: a change of one of them may be the mend.
func ParseTrust(path string, data []byte) (*Trust, error) {
	t := &Trust{Roots: map[spiffeid.TrustDomain][]*x509.Certificate{}}
	dir := filepath.Dir(path)
	err := strict.Read(path, data, func(o *strict.Object) {
		o.Objects("trust", func(o *strict.Object) { t.readDomain(o, dir) })
		o.Object("deny", func(o *strict.Object) {
			strict.List(o, "serials", &t.DeniedSerials, "serial numbers in hexadecimal, such as 3f:2a:9c", parseSerial)
			o.IDs("ids", &t.DeniedIDs)
		})
	})
	if err != nil {
		return &Trust{Files: t.Files}, err
	}
	return t, nil
}

func (t *Trust) readDomain(o *strict.Object, dir string) {
	var td spiffeid.TrustDomain
	var roots [][]*x509.Certificate
	o.Require("domain", "a SPIFFE trust domain")
	o.TrustDomain("domain", &td)
	o.RequireList("roots", "paths of PEM files with root certificates")
	strict.List(o, "roots", &roots, "paths of PEM files with root certificates", func(text string) ([]*x509.Certificate, error) {
		path, err := resolve(dir, text)
		if err != nil {
			return nil, err
		}
		t.Files = append(t.Files, path)
		return readRoots(path)
	})
	if _, twice := t.Roots[td]; twice && !td.IsZero() {
		o.Fail("domain", "each domain once, with all its roots", "%q is given twice", td.Name())
	}
	t.Roots[td] = slices.Concat(roots...)
}

func readRoots(path string) ([]*x509.Certificate, error) {
	rest, err := input.Read(path, input.MaxPEM)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		before := rest
		if block, rest = pem.Decode(rest); block == nil {
			if len(certs) == 0 {
				return nil, noRoots(path, before)
			}
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, input.Wrong(path, "leave only certificates there", "holds a %s", strings.ToLower(block.Type))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, input.Wrong(path, mendRoots, "certificate %d is broken (%v)", len(certs)+1, err)
		}
		if !cert.IsCA {
			return nil, input.Wrong(path, "leave only roots there", "certificate %d (%s) is not a CA's", len(certs)+1, cert.Subject)
		}
		certs = append(certs, cert)
	}
	if rest = bytes.TrimSpace(rest); bytes.HasPrefix(rest, []byte("-----BEGIN ")) {
		return nil, input.Wrong(path, mendRoots, "is cut off, or broken, behind certificate %d", len(certs))
	} else if len(rest) > 0 {
		return nil, input.Wrong(path, "leave only certificates in PEM there", "has something that is not PEM behind certificate %d", len(certs))
	}
	return certs, nil
}

// mendRoots is what to do about a broken file of roots.
const mendRoots = "fetch that domain's root certificates anew"

// noRoots says why a file has no certificate.
func noRoots(path string, data []byte) error {
	problem := "holds no certificate in PEM"
	switch data = bytes.TrimSpace(data); {
	case len(data) == 0:
		problem = "is empty"
	case bytes.HasPrefix(data, []byte("-----BEGIN ")):
		problem = "is cut off, or broken"
	}
	return input.Wrong(path, mendRoots, "%s", problem)
}

// parseSerial takes 3f:2a:9c, 3F2A9C and 0x3f2a9c, as the usual tools print it.
func parseSerial(text string) (string, error) {
	digits := strings.ReplaceAll(strings.ToLower(text), ":", "")
	digits = strings.TrimPrefix(digits, "0x")
	n, ok := new(big.Int).SetString(digits, 16)
	if !ok || n.Sign() <= 0 || strings.ContainsAny(digits, "+-_") {
		return "", fmt.Errorf("%q is not valid", text)
	}
	if n.BitLen() > maxSerialBits {
		return "", errors.New("is longer than the 20 bytes of RFC 5280")
	}
	return n.Text(16), nil
}

// maxSerialBits: a serial number has 20 octets at most (RFC 5280 4.1.2.2).
const maxSerialBits = 160
