// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/identity"
)

func TestCertificatesInUse(t *testing.T) {
	dir := newDir(t)
	a := open(t, dir)
	first := svid(t, a, web)
	svid(t, a, db)
	trees := identity.Trees(a.Certificates(), time.Now(), nil)
	if len(trees) != 1 || len(trees[0].Signed) != 1 || len(trees[0].Signed[0].Signed) != 2 {
		t.Fatalf("trees: %+v", trees)
	}
	if got := trees[0].Signed[0].Signed[1]; got.Name != web.String() || !got.NotAfter.Equal(first.Leaf().NotAfter) || len(got.Problems) != 0 {
		t.Errorf("the second leaf is %+v", got)
	}

	f, err := Inspect(dir)
	if err != nil || f.Domain != mesh || !f.RootKey || !f.IntermediateKey || len(f.Roots[mesh]) != 1 || len(f.Intermediates) != 1 {
		t.Errorf("the folder holds %+v, %v", f, err)
	}
	for _, name := range []string{rootKey, intermediateCert} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if f, err := Inspect(dir); err != nil || f.RootKey || len(f.Intermediates) != 0 {
		t.Errorf("without them it holds %+v, %v", f, err)
	}
	if _, err := Inspect(newDir(t)); !missing(err) {
		t.Errorf("of an empty folder: %v", err)
	}
}
