// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
)

var (
	meshTD   = spiffeid.RequireTrustDomainFromString("mesh.example")
	clientID = spiffeid.RequireFromString("spiffe://mesh.example/ns/demo/sa/client")
	serverID = spiffeid.RequireFromString("spiffe://mesh.example/ns/demo/sa/server")
)

// authority signs SVIDs, also wrong ones: root, intermediate, leaf.
type authority struct {
	t       testing.TB
	root    *x509.Certificate
	inter   *x509.Certificate
	rootKey *ecdsa.PrivateKey
	key     *ecdsa.PrivateKey
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newAuthority(t testing.TB, td spiffeid.TrustDomain) *authority {
	t.Helper()
	a := &authority{t: t, rootKey: newKey(t), key: newKey(t)}
	ca := func(serial int64, name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
			URIs: []*url.URL{td.ID().URL()},
		}
	}
	r := ca(1, "root")
	a.root = sign(t, r, r, &a.rootKey.PublicKey, a.rootKey)
	a.inter = sign(t, ca(2, "intermediate"), a.root, &a.key.PublicKey, a.rootKey)
	return a
}

// svid signs an SVID of id, whose template change may spoil.
func (a *authority) svid(id spiffeid.ID, change ...func(*x509.Certificate)) *identity.SVID {
	a.t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		NotBefore:    time.Now().Add(-time.Minute), NotAfter: time.Now().Add(30 * time.Minute),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{id.URL()},
	}
	for _, c := range change {
		c(tmpl)
	}
	key := newKey(a.t)
	leaf := sign(a.t, tmpl, a.inter, &key.PublicKey, a.key)
	return &identity.SVID{ID: id, Certificates: []*x509.Certificate{leaf, a.inter}, Key: key}
}

func (a *authority) verifier() identity.Verifier {
	return identity.Verifier{Bundles: bundles{meshTD: x509bundle.FromX509Authorities(meshTD, []*x509.Certificate{a.root})}}
}

type bundles map[spiffeid.TrustDomain]*x509bundle.Bundle

func (b bundles) Bundle(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if one, ok := b[td]; ok {
		return one, nil
	}
	return nil, identity.ErrUnknownTrustDomain
}

func (a *authority) client() Config {
	return Config{SVID: a.svid(clientID), Verifier: a.verifier(), Expect: serverID}
}

func (a *authority) server() Config {
	return Config{SVID: a.svid(serverID), Verifier: a.verifier()}
}

// writePEM writes an SVID's chain and key, and the root, for OpenSSL.
func (a *authority) writePEM(svid *identity.SVID) (cert, key, root string) {
	a.t.Helper()
	dir := a.t.TempDir()
	write := func(name, typ string, ders ...[]byte) string {
		var b bytes.Buffer
		for _, der := range ders {
			pem.Encode(&b, &pem.Block{Type: typ, Bytes: der})
		}
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b.Bytes(), 0o600); err != nil {
			a.t.Fatal(err)
		}
		return p
	}
	var chain [][]byte
	for _, c := range svid.Certificates {
		chain = append(chain, c.Raw)
	}
	der, err := x509.MarshalPKCS8PrivateKey(svid.Key)
	if err != nil {
		a.t.Fatal(err)
	}
	return write("cert.pem", "CERTIFICATE", chain...), write("key.pem", "PRIVATE KEY", der), write("root.pem", "CERTIFICATE", a.root.Raw)
}

// sockets are the two ends of a stream, with the kernel's buffers between them.
// Unix sockets do: a handshake does not know what carries it.
func sockets(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	for _, c := range []net.Conn{a, b} {
		// Whatever hangs ends with an error; Client and Server clear it.
		c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return a, b
}

type outcome struct {
	*Result
	err error
}

// both runs both sides to their ends.
func both(t testing.TB, c, s net.Conn, cc, sc Config) (client, server outcome) {
	t.Helper()
	done := make(chan outcome)
	go func() {
		r, err := Server(context.Background(), s, sc)
		done <- outcome{r, err}
	}()
	r, err := Client(context.Background(), c, cc)
	return outcome{r, err}, <-done
}
