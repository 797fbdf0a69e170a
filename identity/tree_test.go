// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"crypto/x509"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// outline is a tree in lines: kind, name and the first words of each problem.
func outline(trees []*identity.Tree, indent string) (lines []string) {
	for _, t := range trees {
		line := fmt.Sprintf("%s%s %s", indent, t.Kind, t.Name)
		for _, p := range t.Problems {
			line += "; " + strings.Split(p, ":")[0]
		}
		lines = append(lines, line)
		lines = append(lines, outline(t.Signed, indent+"  ")...)
	}
	return lines
}

func TestTreesSayWhatIsWrong(t *testing.T) {
	ca, stranger := newCA(t, "mesh.example"), newCA(t, "stranger.example")
	leaf := func(by *testca.CA, name string, options ...testca.Option) *x509.Certificate {
		return chain(t, by, spiffeid.RequireFromString("spiffe://"+by.TrustDomain.Name()+"/ns/demo/sa/"+name), options...)[0]
	}
	revoked := leaf(ca, "revoked")
	all := identity.Certificates{
		Roots:         map[spiffeid.TrustDomain][]*x509.Certificate{ca.TrustDomain: {ca.Root}},
		Intermediates: []*x509.Certificate{ca.Intermediate},
		Leaves: []*x509.Certificate{
			leaf(ca, "good"),
			leaf(ca, "expired", testca.Expired),
			leaf(ca, "early", testca.NotYetValid, testca.ValidFor(9*time.Hour)),
			revoked,
			leaf(stranger, "lost"),
		},
	}
	denied := func(c *x509.Certificate, id spiffeid.ID) (string, bool) {
		return "on the list", c.Equal(revoked) && id.Path() == "/ns/demo/sa/revoked"
	}
	got := identity.Trees(all, time.Now(), denied)
	want := []string{
		"root test root of mesh.example",
		"  intermediate " + got[0].Signed[0].Name,
		"    leaf spiffe://mesh.example/ns/demo/sa/good",
		"    leaf spiffe://mesh.example/ns/demo/sa/expired; expired",
		"    leaf spiffe://mesh.example/ns/demo/sa/early; not yet valid",
		"    leaf spiffe://mesh.example/ns/demo/sa/revoked; denied",
		"leaf spiffe://stranger.example/ns/demo/sa/lost; its issuer is not known",
	}
	if diff := cmp.Diff(want, outline(got, "")); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if got[0].Domain != "mesh.example" || got[1].Domain != "stranger.example" || got[0].Serial != ca.Root.SerialNumber.Text(16) {
		t.Errorf("the first two are %+v, %+v", got[0], got[1])
	}

	// The same an instant before and after the last quarter of the good one's life.
	good := all.Leaves[0]
	soon := good.NotAfter.Add(-good.NotAfter.Sub(good.NotBefore) / 4)
	for after, want := range map[time.Duration]int{-time.Second: 0, time.Second: 1} {
		got := identity.Trees(all, soon.Add(after), nil)[0].Signed[0].Signed[0].Problems
		if len(got) != want {
			t.Errorf("%v after it begins to end soon: %q", after, got)
		}
	}
}
