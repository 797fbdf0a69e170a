// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/internal/testca"
)

// told notes what a change of the trust file is told to.
type told struct {
	roots   map[spiffeid.TrustDomain][]*x509.Certificate
	revoked int
}

func (o *told) SetExtraRoots(r map[spiffeid.TrustDomain][]*x509.Certificate) { o.roots = r }

func TestTrustFileIsTakenUp(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	root := func() string {
		ca, err := testca.New("mesh.example")
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Root.Raw}))
	}
	mesh := spiffeid.RequireTrustDomainFromString("mesh.example")
	gone := spiffeid.RequireFromString("spiffe://mesh.example/ns/demo/sa/gone")
	roots := "trust: [{domain: mesh.example, roots: [%s]}]\n"
	deny := "deny: {ids: [" + gone.String() + "]}\n"

	write("one.pem", root())
	write("trust.yaml", fmt.Sprintf(roots, "one.pem"))
	tr, err := readTrust(filepath.Join(dir, "trust.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	out := &told{roots: tr.inForce.Load().Roots}
	tr.issuer, tr.revoke = out, func() { out.revoked++ }
	var log strings.Builder
	registry := prometheus.NewRegistry()
	r := newReports(slog.New(slog.NewTextHandler(&log, nil)), registry, "trust")
	looks := func(what string, n, revoked int, denied bool) {
		t.Helper()
		for range 4 { // it takes two that find the same
			tr.look(r)
		}
		_, is := tr.Denied(nil, gone)
		if len(out.roots[mesh]) != n || out.revoked != revoked || is != denied {
			t.Errorf("%s: %d roots, applied %d times, denied %v; want %d, %d, %v", what, len(out.roots[mesh]), out.revoked, is, n, revoked, denied)
		}
	}
	looks("at first", 1, 0, false)
	write("trust.yaml", fmt.Sprintf(roots, "one.pem")+deny)
	looks("a deny list", 1, 1, true)
	write("one.pem", root()+root())
	looks("another root in the file that it names", 2, 2, true)
	write("one.pem", "")
	looks("a broken root", 2, 2, true)
	write("trust.yaml", "trust: [{domain: mesh.example, roots: [two.pem]}]\n")
	looks("a root that is missing", 2, 2, true)
	write("two.pem", root()) // of which it did not know
	looks("mended", 1, 3, false)
	write("trust.yaml", "trust: {")
	looks("no YAML", 1, 3, false)
	if err := os.Remove(filepath.Join(dir, "trust.yaml")); err != nil {
		t.Fatal(err)
	}
	looks("removed", 1, 3, false)
	write("trust.yaml", deny)
	looks("there again", 0, 4, true)
	tr.reload(r)
	looks("told to", 0, 5, true)

	// An emptied file is an accident, and lifts nothing.
	for _, text := range []string{"", " \n"} {
		write("trust.yaml", text)
		looks("emptied", 0, 5, true)
		tr.reload(r)
		looks("emptied, and told to read it", 0, 5, true)
		write("trust.yaml", deny)
		looks("as it was", 0, 6, true)
		out.revoked = 5
	}
	write("trust.yaml", "trust: []\n")
	looks("nothing is listed", 0, 6, false)

	for _, line := range []string{"one.pem", "two.pem", "trust.yaml"} {
		if !strings.Contains(log.String(), line) {
			t.Errorf("%s is not named:\n%s", line, log.String())
		}
	}
	if n := strings.Count(log.String(), "is not taken"); n != 8 {
		t.Errorf("said %d times that it is broken, want 8:\n%s", n, log.String())
	}
	if n := strings.Count(log.String(), "trust.yaml:1: the file is empty by now"); n != 4 {
		t.Errorf("said %d times that it was emptied, want 4:\n%s", n, log.String())
	}
	if _, err := readTrust(filepath.Join(dir, "none.yaml")); err == nil {
		t.Error("a file that is missing at the start is taken")
	}
}
