// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/internal/input"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// What Open refuses, and that the error names the file and the mend.
func TestOpenRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(t *testing.T, dir string)
		want  []string // in the error
	}{
		"directory that others can enter": {chmod(".", 0o755), []string{"chmod 700"}},
		"intermediate.key that others can read": {chmod(intermediateKey, 0o640),
			[]string{intermediateKey, "0640", "chmod 600"}},
		"root.key that others can read": {chmod(rootKey, 0o604), []string{rootKey, "chmod 600"}},
		"root.pem missing":              {remove(rootCert), []string{rootCert, "missing", "put it back"}},
		"intermediate missing and no root.key": {func(t *testing.T, dir string) {
			remove(rootKey, intermediateCert)(t, dir)
		}, []string{intermediateCert, "ztunnel ca intermediate"}},
		"intermediate.key missing and no root.key": {func(t *testing.T, dir string) {
			remove(rootKey, intermediateKey)(t, dir)
		}, []string{intermediateKey, "ztunnel ca intermediate"}},
		"intermediate.key of another pair": {foreign(intermediateKey), []string{intermediateKey, "does not belong to", intermediateCert}},
		"intermediate of another root":     {foreign(intermediateCert, intermediateKey), []string{intermediateCert, "does not chain", rootCert}},
		"root.key of another pair":         {foreign(rootKey), []string{rootKey, "does not belong to", rootCert}},
		"root.pem of another mesh":         {foreign(rootCert), []string{rootKey, "does not belong to", rootCert}},
		"root.pem of another mesh, no key": {func(t *testing.T, dir string) {
			remove(rootKey)(t, dir)
			foreign(rootCert)(t, dir)
		}, []string{intermediateCert, "does not chain"}},
		"empty root.pem":               {overwrite(rootCert, ""), []string{rootCert, "is empty"}},
		"root.pem with something else": {overwrite(rootCert, "hello"), []string{rootCert, "no PEM block"}},
		"root.pem with a broken block": {overwrite(rootCert, "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n"), []string{rootCert}},
		"root.pem with a key":          {copyOf(rootCert, intermediateKey), []string{rootCert, "only CERTIFICATE"}},
		"intermediate.key with no key": {overwrite(intermediateKey, "hello"), []string{intermediateKey, "no PEM block"}},
		"intermediate.pem with two":    {twice(intermediateCert), []string{intermediateCert, "2 certificates"}},
		"intermediate.pem is the root": {func(t *testing.T, dir string) { copyOf(intermediateCert, rootCert)(t, dir) }, []string{"does not belong to"}},
		"a huge file":                  {overwrite(rootCert, strings.Repeat("x", input.MaxPEM+1)), []string{rootCert, "right file"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(newDir(t), "ca")
			open(t, dir)
			tc.spoil(t, dir)
			_, err := Open(t.Context(), Config{Dir: dir, TrustDomain: mesh})
			if err == nil {
				t.Fatal("opened")
			}
			for _, w := range append(tc.want, dir) {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q lacks %q", err, w)
				}
			}
		})
	}
	t.Run("another trust domain", func(t *testing.T) {
		dir := newDir(t)
		open(t, dir)
		_, err := Open(t.Context(), Config{Dir: dir, TrustDomain: spiffeid.RequireTrustDomainFromString("other.example")})
		if err == nil || !strings.Contains(err.Error(), "mesh.example") || !strings.Contains(err.Error(), "trustDomain") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no directory but a file", func(t *testing.T) {
		path := filepath.Join(newDir(t), "ca")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), Config{Dir: path, TrustDomain: mesh}); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no trust domain", func(t *testing.T) {
		if _, err := Open(t.Context(), Config{Dir: newDir(t)}); err == nil {
			t.Error("opened")
		}
	})
	t.Run("an empty directory that others can enter", func(t *testing.T) {
		dir := newDir(t)
		chmod(".", 0o755)(t, dir)
		if _, err := Open(t.Context(), Config{Dir: dir, TrustDomain: mesh}); err == nil || !strings.Contains(err.Error(), "chmod 700") {
			t.Errorf("got %v", err)
		}
		if got := names(t, dir); len(got) > 0 {
			t.Errorf("wrote %v", got)
		}
	})
}

func chmod(name string, m os.FileMode) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		if err := os.Chmod(filepath.Join(dir, name), m); err != nil {
			t.Fatal(err)
		}
	}
}

func remove(names ...string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		for _, n := range names {
			if err := os.Remove(filepath.Join(dir, n)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func overwrite(name, text string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func copyOf(name, from string) func(*testing.T, string) {
	return func(t *testing.T, dir string) { overwrite(name, content(t, dir, from))(t, dir) }
}

func twice(name string) func(*testing.T, string) {
	return func(t *testing.T, dir string) { overwrite(name, content(t, dir, name)+content(t, dir, name))(t, dir) }
}

func content(t *testing.T, dir, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// foreign puts another mesh's files in place.
func foreign(names ...string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		other, err := testca.New(mesh.Name())
		if err != nil {
			t.Fatal(err)
		}
		from := newDir(t)
		if err := other.WriteDir(from); err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			overwrite(n, content(t, from, n))(t, dir)
		}
	}
}

// Files that this package did not make, without SPIFFE IDs in them.
func TestOpenFilesOfOthers(t *testing.T) {
	other, err := testca.New(mesh.Name())
	if err != nil {
		t.Fatal(err)
	}
	dir := newDir(t)
	if err := other.WriteDir(dir); err != nil {
		t.Fatal(err)
	}
	s := svid(t, open(t, dir), web)
	accepts(t, testca.Source{other}, s)
	// testca's root ends within the day.
	if s.Leaf().NotAfter.After(other.Intermediate.NotAfter) {
		t.Errorf("leaf ends at %s, its issuer at %s", s.Leaf().NotAfter, other.Intermediate.NotAfter)
	}
}

// A first start that was cut short behind the root is completed.
func TestOpenCompletes(t *testing.T) {
	for _, names := range [][]string{{intermediateCert}, {intermediateCert, intermediateKey}, {intermediateKey}} {
		dir := newDir(t)
		open(t, dir)
		remove(names...)(t, dir)
		a := open(t, dir)
		accepts(t, a, svid(t, a, web))
	}
}

// A write is seen whole or not at all, and one that fails leaves what was there.
func TestWritesAreAtomic(t *testing.T) {
	dir := newDir(t)
	path := filepath.Join(dir, "file")
	a, b := bytes.Repeat([]byte("a"), 100_000), bytes.Repeat([]byte("b"), 100_000)
	if err := write(path, a); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for !closed(stop) {
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got, a) && !bytes.Equal(got, b) {
				t.Errorf("read %d bytes: %v", len(got), err)
				return
			}
		}
	}()
	for i := range 50 {
		if err := write(path, [][]byte{b, a}[i%2]); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	<-done
	if mode(t, path) != 0o600 {
		t.Errorf("mode %o", mode(t, path))
	}

	// A directory in the way makes the rename fail.
	blocked := filepath.Join(dir, "blocked")
	if err := os.MkdirAll(filepath.Join(blocked, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := write(blocked, a); err == nil || !strings.Contains(err.Error(), blocked) {
		t.Errorf("got %v", err)
	}
	if got := names(t, dir); !slices.Equal(got, []string{"blocked", "file"}) {
		t.Errorf("left %v", got)
	}
}
