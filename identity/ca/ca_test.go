// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/testca"
)

var (
	mesh = spiffeid.RequireTrustDomainFromString("mesh.example")
	web  = spiffeid.RequireFromString("spiffe://mesh.example/ns/demo/sa/web")
	db   = spiffeid.RequireFromString("spiffe://mesh.example/ns/demo/sa/db")
)

var _ identity.Source = (*Authority)(nil)

func open(t *testing.T, dir string, change ...func(*Config)) *Authority {
	t.Helper()
	cfg := Config{Dir: dir, TrustDomain: mesh}
	for _, c := range change {
		c(&cfg)
	}
	a, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// newDir is t.TempDir, which only we can enter.
func newDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func svid(t *testing.T, a *Authority, id spiffeid.ID) *identity.SVID {
	t.Helper()
	s, err := a.SVID(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// accepts fails unless a peer that trusts what by trusts takes the SVID.
func accepts(t *testing.T, by identity.BundleSource, s *identity.SVID) {
	t.Helper()
	peer, failure := identity.Verifier{Bundles: by}.Verify(s.Certificates, s.ID)
	if failure != nil {
		t.Fatal(failure)
	}
	if peer.ID != s.ID {
		t.Errorf("peer is %s, want %s", peer.ID, s.ID)
	}
}

func mode(t *testing.T, path string) os.FileMode {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode().Perm()
}

func TestFirstStart(t *testing.T) {
	dir := filepath.Join(newDir(t), "lib", "ca")
	a := open(t, dir)
	got := map[string]os.FileMode{".": mode(t, dir)}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		got[e.Name()] = mode(t, filepath.Join(dir, e.Name()))
	}
	want := map[string]os.FileMode{".": 0o700, "root.pem": 0o600, "root.key": 0o600, "intermediate.pem": 0o600, "intermediate.key": 0o600}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files and modes (-want +got):\n%s", diff)
	}

	s := svid(t, a, web)
	accepts(t, a, s)
	leaf, inter := s.Certificates[0], s.Certificates[1]
	if len(s.Certificates) != 2 {
		t.Errorf("%d certificates, want leaf and intermediate", len(s.Certificates))
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life != DefaultLeafTTL+backdate {
		t.Errorf("leaf lives for %s", life)
	}
	for _, c := range []*x509.Certificate{leaf, inter, a.files.roots[0]} {
		key, ok := c.PublicKey.(*ecdsa.PublicKey)
		if !ok || key.Curve != elliptic.P256() {
			t.Errorf("%s: a key of type %T", c.Subject, c.PublicKey)
		}
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || !inter.MaxPathLenZero {
		t.Errorf("leaf %v %b, intermediate's path length zero: %t", leaf.IsCA, leaf.KeyUsage, inter.MaxPathLenZero)
	}
	if pub := leaf.PublicKey.(*ecdsa.PublicKey); !pub.Equal(s.Key.Public()) {
		t.Error("the key is not the leaf's")
	}
	if again := svid(t, a, web); again != s {
		t.Error("the second call issued anew")
	}
	if other := svid(t, a, db); other == s || other.ID != db {
		t.Errorf("got %s for %s", other.ID, db)
	}
}

// rustls refuses any chain with a name constraint for URIs (RUSTSEC-2026-0098),
// and Istio's ztunnel is built on it.
func TestNoNameConstraints(t *testing.T) {
	a := open(t, newDir(t))
	for _, c := range append(svid(t, a, web).Certificates, a.files.roots...) {
		for _, e := range c.Extensions {
			if e.Id.String() == "2.5.29.30" {
				t.Errorf("%s has name constraints", c.Subject)
			}
		}
	}
}

// No key of a leaf reaches the disk.
func TestLeafKeysStayInMemory(t *testing.T) {
	dir := newDir(t)
	a := open(t, dir)
	before := names(t, dir)
	s := svid(t, a, web)
	if diff := cmp.Diff(before, names(t, dir)); diff != "" {
		t.Errorf("issuing wrote files: %s", diff)
	}
	der, err := x509.MarshalPKCS8PrivateKey(s.Key)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names(t, dir) {
		data, err := os.ReadFile(filepath.Join(dir, n))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(data, der) {
			t.Errorf("%s holds the leaf's key", n)
		}
	}
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestOpenAgain(t *testing.T) {
	dir := newDir(t)
	first := svid(t, open(t, dir), web)
	a := open(t, dir)
	accepts(t, a, first) // a restart changes neither root nor intermediate
	if !svid(t, a, web).Certificates[1].Equal(first.Certificates[1]) {
		t.Error("another intermediate after a restart")
	}
}

func TestRootKeyIsOffline(t *testing.T) {
	dir := newDir(t)
	before := svid(t, open(t, dir), web)
	if err := os.Remove(filepath.Join(dir, rootKey)); err != nil {
		t.Fatal(err)
	}
	a := open(t, dir)
	accepts(t, a, before)
	accepts(t, a, svid(t, a, db))
	if _, err := os.Stat(filepath.Join(dir, rootKey)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("root.key: %v", err)
	}
}

func TestNodesShareARoot(t *testing.T) {
	rootDir, one, two := newDir(t), filepath.Join(newDir(t), "one"), filepath.Join(newDir(t), "two")
	if err := Init(rootDir, mesh, time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{one, two} {
		if err := NewIntermediate(rootDir, dir, mesh, time.Now()); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"intermediate.key", "intermediate.pem", "root.pem"}, names(t, dir)); diff != "" {
			t.Errorf("a node is given %s", diff)
		}
		if mode(t, dir) != 0o700 || mode(t, filepath.Join(dir, intermediateKey)) != 0o600 {
			t.Errorf("modes %o and %o", mode(t, dir), mode(t, filepath.Join(dir, intermediateKey)))
		}
	}
	a, b := open(t, one), open(t, two)
	accepts(t, a, svid(t, b, web))
	accepts(t, b, svid(t, a, db))
	if a.files.intermediate.cert.Equal(b.files.intermediate.cert) {
		t.Error("both nodes have the same intermediate")
	}
	if err := Init(rootDir, mesh, time.Now()); err == nil || !strings.Contains(err.Error(), "not overwritten") {
		t.Errorf("second Init: %v", err)
	}
	if err := NewIntermediate(rootDir, one, mesh, time.Now()); err == nil || !strings.Contains(err.Error(), "not overwritten") {
		t.Errorf("second NewIntermediate: %v", err)
	}
	if err := NewIntermediate(rootDir, newDir(t), spiffeid.RequireTrustDomainFromString("other.example"), time.Now()); err == nil || !strings.Contains(err.Error(), "of trust domain mesh.example") {
		t.Errorf("NewIntermediate of another domain: %v", err)
	}
	if err := NewIntermediate(one, newDir(t), mesh, time.Now()); err == nil || !strings.Contains(err.Error(), "bring the root's key") {
		t.Errorf("NewIntermediate without root.key: %v", err)
	}
	foreign := newDir(t)
	if err := Init(foreign, mesh, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := NewIntermediate(foreign, one, mesh, time.Now()); err == nil || !strings.Contains(err.Error(), "another root") {
		t.Errorf("NewIntermediate of another root: %v", err)
	}
}

func TestBundles(t *testing.T) {
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	other, err := testca.New(partner.Name())
	if err != nil {
		t.Fatal(err)
	}
	next, err := testca.New(mesh.Name())
	if err != nil {
		t.Fatal(err)
	}
	a := open(t, newDir(t), func(c *Config) {
		c.ExtraRoots = map[spiffeid.TrustDomain][]*x509.Certificate{partner: {other.Root}, mesh: {next.Root}}
	})
	for _, tc := range []struct {
		ca *testca.CA
		id spiffeid.ID
	}{{other, spiffeid.RequireFromString("spiffe://partner.example/ns/demo/sa/web")}, {next, web}} {
		s, err := tc.ca.SVID(tc.id)
		if err != nil {
			t.Fatal(err)
		}
		accepts(t, a, s)
	}
	accepts(t, a, svid(t, a, web))
	if _, err := a.Bundle(spiffeid.RequireTrustDomainFromString("nobody.example")); !errors.Is(err, identity.ErrUnknownTrustDomain) {
		t.Errorf("got %v", err)
	}
	for _, id := range []spiffeid.ID{{}, partner.ID(), mesh.ID(), spiffeid.RequireFromPath(partner, "/ns/demo/sa/web")} {
		if _, err := a.SVID(t.Context(), id); err == nil {
			t.Errorf("issued %q", id)
		}
	}
}

func TestConcurrentCallsShareOneIssuance(t *testing.T) {
	a := open(t, newDir(t))
	counted := &signer{Signer: a.files.intermediate.key}
	a.files.intermediate.key = counted
	got := make([]*identity.SVID, 50)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() { got[i], _ = a.SVID(t.Context(), web) })
	}
	wg.Wait()
	for _, s := range got {
		if s == nil || s != got[0] {
			t.Fatal("not the same SVID for all")
		}
	}
	if n := counted.count(); n != 1 {
		t.Errorf("%d signatures, want 1", n)
	}
}
