// SPDX-License-Identifier: Apache-2.0

package testca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestIstio: the authority that Istio's ztunnel asks answers as it expects.
func TestIstio(t *testing.T) {
	ca, err := New("example.org")
	if err != nil {
		t.Fatal(err)
	}
	const id = "spiffe://example.org/ns/demo/sa/web"
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	svid, err := ca.SVID(spiffeid.RequireFromString(id))
	must(err)
	good, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: svid.Certificates[0].URIs}, key)
	must(err)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good})
	body := append(binary.AppendUvarint([]byte{1<<3 | 2}, uint64(len(text))), text...)
	message := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
	server, err := ca.Istio(nil)
	must(err)
	issue := server.Handler.(Issue)
	out, err := issue.answer(message)
	must(err)
	for i := range 3 {
		n, size := binary.Uvarint(out[1:])
		block, rest := pem.Decode(out[1+size:][:n])
		if out[0] != 1<<3|2 || block == nil || len(rest) != 0 {
			t.Fatalf("field %d is no certificate", i)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		must(err)
		if i == 0 {
			if len(c.URIs) != 1 || c.URIs[0].String() != id {
				t.Errorf("the leaf is %v's", c.URIs)
			}
			if half := c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 2); time.Until(half) < 10*time.Minute {
				t.Errorf("it is to be renewed at %v already", half)
			}
		}
		out = out[1+size+int(n):]
	}
	for _, bad := range [][]byte{nil, message[:5], message[:len(message)-1], append([]byte{1}, message[1:]...)} {
		if _, err := issue.answer(bad); err == nil {
			t.Errorf("%d bytes that are no request are answered", len(bad))
		}
	}
}
