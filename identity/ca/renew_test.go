// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
)

// signer counts signatures, and fails while err is set.
type signer struct {
	crypto.Signer
	mu  sync.Mutex
	n   int
	err error
}

func (s *signer) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	if s.err != nil {
		return nil, s.err
	}
	return s.Signer.Sign(rand, digest, opts)
}

func (s *signer) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *signer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// run starts Run in a bubble and ends it with the test.
func run(t *testing.T, a *Authority) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); a.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
}

func TestRenewOnDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, newDir(t), func(c *Config) { c.LeafTTL = time.Hour })
		first, changed := svid(t, a, web), a.Changed()
		time.Sleep(26 * time.Minute) // 0.45 of an hour is 27
		if svid(t, a, web) != first || closed(changed) {
			t.Error("renewed before half its life, less the spread")
		}
		time.Sleep(8 * time.Minute) // 0.55 is 33
		second := svid(t, a, web)
		if second == first || !closed(changed) {
			t.Error("not renewed after half its life, or nobody was told")
		}
		if first.Leaf().SerialNumber.Cmp(second.Leaf().SerialNumber) == 0 || first.Key == second.Key {
			t.Error("renewed with the same key or serial number")
		}
		accepts(t, a, first) // still good, for sessions that go on
		accepts(t, a, second)
	})
}

func TestRunRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, newDir(t), func(c *Config) { c.LeafTTL = time.Hour })
		first, changed := svid(t, a, web), a.Changed()
		run(t, a)
		time.Sleep(36*time.Minute + time.Second) // 33, and up to 3 to the next look
		if !closed(changed) {
			t.Fatal("not renewed by itself")
		}
		e := a.svids[web]
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.svid == first || !e.svid.Leaf().NotAfter.After(first.Leaf().NotAfter) {
			t.Error("the new one is not newer")
		}
	})
}

// An identity that is used is valid at any time; one that nobody asks for is
// forgotten.
func TestRunOverDays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, newDir(t))
		svid(t, a, db)
		run(t, a)
		for range 7 * 24 {
			s := svid(t, a, web)
			if left := time.Until(s.Leaf().NotAfter); left < 10*time.Hour {
				t.Fatalf("%s left of a day", left)
			}
			time.Sleep(time.Hour)
		}
		if _, there := a.svids[db]; there {
			t.Error("renews for a pod that is gone")
		}
		accepts(t, a, svid(t, a, db))
	})
}

func TestSpreadOfRenewals(t *testing.T) {
	now := time.Now()
	var lo, hi float64 = 1, 0
	for range 1000 {
		at := renewAt(now, now.Add(time.Hour)).Sub(now).Hours()
		lo, hi = min(lo, at), max(hi, at)
	}
	if lo < 0.45 || hi > 0.55 || hi-lo < 0.05 {
		t.Errorf("between %f and %f of the life", lo, hi)
	}
}

func TestFailedRenewalKeepsTheValidOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		a := open(t, newDir(t), func(c *Config) {
			c.LeafTTL = time.Hour
			c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		})
		s := &signer{Signer: a.files.intermediate.key}
		a.files.intermediate.key = s
		first, changed := svid(t, a, web), a.Changed()
		s.fail(errors.New("the key is on holiday"))

		time.Sleep(40 * time.Minute)
		if svid(t, a, web) != first {
			t.Fatal("the valid one is gone")
		}
		n := s.count()
		svid(t, a, web)
		if s.count() != n {
			t.Error("tries again at once: a busy pod would sign without end")
		}
		time.Sleep(retryEvery)
		svid(t, a, web)
		if s.count() != n+1 {
			t.Error("does not try again after a minute")
		}
		if _, err := a.SVID(t.Context(), db); err == nil || !strings.Contains(err.Error(), "on holiday") {
			t.Errorf("a new identity: %v", err)
		}
		if closed(changed) {
			t.Error("announced a change that was none")
		}
		if !strings.Contains(log.String(), "on holiday") || !strings.Contains(log.String(), web.String()) {
			t.Errorf("log: %s", log.String())
		}

		time.Sleep(time.Until(first.Leaf().NotAfter) + time.Second)
		got, err := a.SVID(t.Context(), web)
		if err == nil {
			t.Errorf("gave an SVID that ended at %s", got.Leaf().NotAfter)
		}
		wantExpired(t, err, "ended at", "on holiday")
		if _, err := a.SVID(t.Context(), db); err == nil || errors.As(err, new(*identity.Failure)) {
			t.Errorf("a new identity: %v, want an error that has nothing to do with time", err)
		}
		s.fail(nil)
		accepts(t, a, svid(t, a, web))
	})
}

// A leaf does not outlive its issuer, and is renewed by what is left.
func TestLeafEndsWithItsIssuer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := newDir(t)
		open(t, dir)
		remove(rootKey)(t, dir)
		time.Sleep(intermediateLife - 6*time.Hour)
		a := open(t, dir)
		s := svid(t, a, web)
		if !s.Leaf().NotAfter.Equal(a.files.intermediate.cert.NotAfter) {
			t.Errorf("leaf ends at %s, issuer at %s", s.Leaf().NotAfter, a.files.intermediate.cert.NotAfter)
		}
		time.Sleep(6 * time.Hour)
		_, err := a.SVID(t.Context(), db)
		wantExpired(t, err, "the intermediate has expired", "ztunnel ca intermediate")
		time.Sleep(time.Second)
		_, err = Open(t.Context(), Config{Dir: dir, TrustDomain: mesh})
		if err == nil || !strings.Contains(err.Error(), "expired") || !strings.Contains(err.Error(), "ztunnel ca intermediate") {
			t.Errorf("Open: %v", err)
		}
	})
}

// With the root's key here an intermediate is renewed by itself, with the key
// that it has: over ten years, the root's life, nobody has to come.
func TestIntermediateIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := newDir(t)
		a := open(t, dir, func(c *Config) { c.LeafTTL = 30 * 24 * time.Hour })
		first, key := a.files.intermediate.cert, content(t, dir, intermediateKey)
		before := svid(t, a, web)
		time.Sleep(intermediateLife/2 + time.Hour)
		_ = a.Reload()
		second := a.files.intermediate.cert
		if second.Equal(first) || !second.NotAfter.After(first.NotAfter) {
			t.Fatal("not renewed")
		}
		if content(t, dir, intermediateKey) != key {
			t.Error("another key: a crash between two files would leave a pair that does not fit")
		}
		after := svid(t, a, web)
		if !after.Certificates[1].Equal(second) || after == before {
			t.Error("leaves are still signed by the old one")
		}
		accepts(t, a, after)
		time.Sleep(intermediateLife * 3 / 4)
		accepts(t, open(t, dir), svid(t, open(t, dir), web)) // at the start too
	})
}

// bring makes a new intermediate, which the daemon that runs takes up.
func bring(t *testing.T, a *Authority, rootDir, dir string) {
	t.Helper()
	run(t, a)
	changed := a.Changed()
	if err := NewIntermediate(rootDir, dir, mesh, time.Now()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(retryEvery + time.Second)
	if !closed(changed) {
		t.Fatal("the new intermediate is not taken up")
	}
}

// Without the root's key somebody has to come, and is told so, once.
func TestIntermediateIsDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		rootDir, dir := newDir(t), filepath.Join(newDir(t), "node")
		if err := Init(rootDir, mesh, time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := NewIntermediate(rootDir, dir, mesh, time.Now()); err != nil {
			t.Fatal(err)
		}
		a := open(t, dir, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
		time.Sleep(intermediateLife/2 + time.Hour)
		old := svid(t, a, web)
		_ = a.Reload()
		_ = a.Reload()
		if n := strings.Count(log.String(), "bring a new one"); n != 1 {
			t.Errorf("said %d times:\n%s", n, log.String())
		}
		accepts(t, a, svid(t, a, web))

		bring(t, a, rootDir, dir)
		s := svid(t, a, web)
		if s.Certificates[1].Equal(old.Certificates[1]) {
			t.Error("signed by the old one")
		}
		accepts(t, a, s)
	})
}

// A root follows another and nothing restarts: first both are trusted, then the
// new one signs, then the old one goes.
func TestRootRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := newDir(t)
		a := open(t, dir)
		old := svid(t, a, web)
		next := filepath.Join(newDir(t), "next")
		if err := Init(next, mesh, time.Now()); err != nil {
			t.Fatal(err)
		}
		b := open(t, next)
		run(t, a)
		tick := func() { time.Sleep(retryEvery + time.Second) }

		changed := a.Changed()
		overwrite(rootCert, content(t, dir, rootCert)+content(t, next, rootCert))(t, dir)
		tick()
		if !closed(changed) {
			t.Fatal("the second root is not taken up")
		}
		accepts(t, a, svid(t, b, db))
		accepts(t, a, old)

		remove(rootKey)(t, dir)
		for _, n := range []string{intermediateKey, intermediateCert} {
			overwrite(n, content(t, next, n))(t, dir)
		}
		tick()
		signedByNext := svid(t, a, web)
		accepts(t, b, signedByNext)

		overwrite(rootCert, content(t, next, rootCert))(t, dir)
		tick()
		if _, f := (identity.Verifier{Bundles: a}).Verify(old.Certificates, web); f == nil {
			t.Error("the old root is still trusted")
		}
		accepts(t, a, svid(t, a, web))
	})
}

// The authority cannot sign any more, and by itself goes on when it can again: with
// what a running one keeps in memory it signs until its intermediate ends.
func TestStoppedPastTheLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rootDir, dir := newDir(t), filepath.Join(newDir(t), "node")
		if err := Init(rootDir, mesh, time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := NewIntermediate(rootDir, dir, mesh, time.Now()); err != nil {
			t.Fatal(err)
		}
		a := open(t, dir, func(c *Config) { c.LeafTTL = time.Hour })
		remove(intermediateKey)(t, dir)
		_ = a.Reload()
		time.Sleep(24 * time.Hour)
		accepts(t, a, svid(t, a, web)) // the key in memory
		time.Sleep(time.Until(a.files.intermediate.cert.NotAfter) + time.Second)
		_, err := a.SVID(t.Context(), web)
		wantExpired(t, err, "the intermediate has expired")

		bring(t, a, rootDir, dir)
		accepts(t, a, svid(t, a, web))
	})
}

func wantExpired(t *testing.T, err error, details ...string) {
	t.Helper()
	var f *identity.Failure
	if !errors.As(err, &f) || f.Reason != identity.ReasonCertificateExpired {
		t.Errorf("%v, want %s", err, identity.ReasonCertificateExpired)
		return
	}
	for _, d := range details {
		if !strings.Contains(f.Detail, d) {
			t.Errorf("detail %q, want %q in it", f.Detail, d)
		}
	}
}

// Roots are replaced while it runs, and whoever waits for a change is told.
func TestSetExtraRoots(t *testing.T) {
	a, b, c := open(t, newDir(t)), open(t, newDir(t)), open(t, newDir(t))
	for _, next := range []*Authority{b, c} {
		changed := a.Changed()
		a.SetExtraRoots(map[spiffeid.TrustDomain][]*x509.Certificate{mesh: next.files.roots})
		if !closed(changed) {
			t.Error("nobody was told")
		}
		accepts(t, a, svid(t, next, web))
		accepts(t, a, svid(t, a, web))
	}
	if _, f := (identity.Verifier{Bundles: a}).Verify(svid(t, b, web).Certificates, web); f == nil {
		t.Error("a root that was taken away is still trusted")
	}
	_ = a.Reload() // keeps them
	accepts(t, a, svid(t, c, web))
}

// Files that cannot be used change nothing.
func TestReloadKeepsWhatWorks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		dir := newDir(t)
		a := open(t, dir, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
		s := svid(t, a, web)
		run(t, a)
		overwrite(rootCert, "")(t, dir)
		time.Sleep(10 * retryEvery)
		accepts(t, a, s)
		accepts(t, a, svid(t, a, db))
		if n := strings.Count(log.String(), "the earlier ones stay in use"); n != 1 {
			t.Errorf("said %d times:\n%s", n, log.String())
		}
	})
}

// Told to read them, it says what is wrong each time; Report only hears of Run.
func TestReloadSaysHowItWent(t *testing.T) {
	dir := newDir(t)
	a := open(t, dir, func(c *Config) { c.Report = func(err error) { t.Errorf("told of %v", err) } })
	if err := a.Reload(); err != nil {
		t.Error(err)
	}
	good := content(t, dir, rootCert)
	overwrite(rootCert, "")(t, dir)
	for range 2 {
		if err := a.Reload(); err == nil || !strings.Contains(err.Error(), "root.pem: is empty: ") {
			t.Errorf("of an empty root.pem: %v", err)
		}
	}
	overwrite(rootCert, good)(t, dir)
	if err := a.Reload(); err != nil {
		t.Error(err)
	}
}
