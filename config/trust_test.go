// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// certificate makes a self-signed one, in PEM.
func certificate(t *testing.T, ca bool) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber:          big.NewInt(0x3f2a9c),
		Subject:               pkix.Name{CommonName: "partner"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  ca,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// parseTrust reads a trust file with PEM files of all sorts beside it.
func parseTrust(t *testing.T, trust string) (*Trust, error) {
	t.Helper()
	dir := t.TempDir()
	root := certificate(t, true)
	for name, data := range map[string][]byte{
		"root.pem":  root,
		"two.pem":   append(certificate(t, true), root...),
		"leaf.pem":  certificate(t, false),
		"key.pem":   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}),
		"empty.pem": nil,
		"cut.pem":   root[:len(root)/2],
		"text.pem":  []byte("hello\n"),
		"tail.pem":  append(append([]byte{}, root...), "-----BEGIN CERT"...),
		"bad.pem":   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return ParseTrust(filepath.Join(dir, "trust.yaml"), []byte(trust))
}

func TestParseTrust(t *testing.T) {
	trust, err := parseTrust(t, `
trust:
- domain: partner.example
  roots: [root.pem, two.pem]
- domain: other.example
  roots: [root.pem]
deny:
  serials: ["00:3F:2A:9c", 12, 1e5, 0xAB]
  ids: [spiffe://cluster.local/ns/demo/sa/old]
`)
	if err != nil {
		t.Fatal(err)
	}
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	if len(trust.Roots) != 2 || len(trust.Roots[partner]) != 3 {
		t.Errorf("roots %v", trust.Roots)
	}
	if diff := cmp.Diff([]string{"3f2a9c", "12", "1e5", "ab"}, trust.DeniedSerials); diff != "" {
		t.Errorf("serials -want +got\n%s", diff)
	}

	leaf := func(serial int64) *x509.Certificate { return &x509.Certificate{SerialNumber: big.NewInt(serial)} }
	good := spiffeid.RequireFromString("spiffe://cluster.local/ns/demo/sa/web")
	old := spiffeid.RequireFromString("spiffe://cluster.local/ns/demo/sa/old")
	for _, tt := range []struct {
		leaf *x509.Certificate
		id   spiffeid.ID
		why  string
	}{
		{leaf(1), good, ""},
		{nil, good, ""},
		{leaf(0x3f2a9c), good, "serial number 3f2a9c is on the deny list"},
		{leaf(1), old, "SPIFFE ID spiffe://cluster.local/ns/demo/sa/old is on the deny list"},
	} {
		why, denied := trust.Denied(tt.leaf, tt.id)
		if why != tt.why || denied != (tt.why != "") {
			t.Errorf("%v %s: %q, %t", tt.leaf, tt.id, why, denied)
		}
	}
}

func TestParseTrustRefuses(t *testing.T) {
	for name, tt := range map[string]struct{ data, want string }{
		"an unknown key":       {"trusts: []\n", "trust.yaml:1:1: trusts: unknown key; did you mean trust?; allowed: deny, trust"},
		"no domain":            {"trust:\n- roots: [root.pem]\n", "trust.yaml:2:3: trust[0].domain: is missing; allowed: a SPIFFE trust domain"},
		"no roots":             {"trust:\n- domain: a\n", "trust.yaml:2:3: trust[0].roots: is missing; allowed: paths of PEM files"},
		"empty roots":          {"trust:\n- domain: a\n  roots: []\n", "trust.yaml:3:10: trust[0].roots: is empty; allowed: paths of PEM files"},
		"a domain twice":       {"trust:\n- domain: a\n  roots: [root.pem]\n- domain: a\n  roots: [root.pem]\n", `trust.yaml:4:11: trust[1].domain: "a" is given twice`},
		"a missing file":       {"trust:\n- domain: a\n  roots: [none.pem]\n", "trust.yaml:3:11: trust[0].roots[0]: "},
		"a leaf":               {"trust:\n- domain: a\n  roots: [leaf.pem]\n", "certificate 1 (CN=partner) is not a CA's"},
		"a key":                {"trust:\n- domain: a\n  roots: [key.pem]\n", "key.pem: holds a private key: leave only certificates there"},
		"an empty file":        {"trust:\n- domain: a\n  roots: [empty.pem]\n", "empty.pem: is empty: fetch"},
		"a torn file":          {"trust:\n- domain: a\n  roots: [tail.pem]\n", "tail.pem: is cut off, or broken, behind certificate 1"},
		"a file that is cut":   {"trust:\n- domain: a\n  roots: [cut.pem]\n", "cut.pem: is cut off, or broken: fetch that domain's root certificates anew; allowed"},
		"no PEM":               {"trust:\n- domain: a\n  roots: [text.pem]\n", "text.pem: holds no certificate in PEM: "},
		"a broken certificate": {"trust:\n- domain: a\n  roots: [bad.pem]\n", "bad.pem: certificate 1 is broken ("},
		"a serial":             {"deny: {serials: [xyz]}\n", `trust.yaml:1:18: deny.serials[0]: "xyz" is not valid; allowed: serial numbers in hexadecimal`},
		"a negative serial":    {"deny: {serials: [-5]}\n", `deny.serials[0]: "-5" is not valid`},
		"a long serial":        {"deny: {serials: [" + strings.Repeat("ff", 21) + "]}\n", "is longer than the 20 bytes of RFC 5280"},
		"an ID":                {"deny: {ids: [ns/demo/sa/old]}\n", `deny.ids[0]: "ns/demo/sa/old" is not valid`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseTrust(t, tt.data)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "trust.yaml:") {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}
