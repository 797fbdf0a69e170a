// SPDX-License-Identifier: Apache-2.0

package docs

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Each target that `make help` lists has rules for all that it needs, where nothing
// is built yet. A target that needs what no rule makes is the control.
func TestMakeTargets(t *testing.T) {
	dir := t.TempDir()
	makefile, err := os.ReadFile(filepath.Join("..", "..", "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	makefile = append(makefile, "\ncontrol: bin/nothing ## none\n"...)
	if err := os.WriteFile(filepath.Join(dir, "Makefile"), makefile, 0o600); err != nil {
		t.Fatal(err)
	}
	make := func(args ...string) (string, error) {
		cmd := exec.Command("make", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=0") // as from a shell, also in make test
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	help, err := make("help")
	if err != nil {
		t.Fatalf("%v: %s", err, help)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(help) {
		target := strings.Fields(line)[0]
		seen[target] = true
		if out, err := make("--dry-run", target); (err != nil) != (target == "control") {
			t.Errorf("make %s: %v: %s", target, err, out)
		}
	}
	for _, target := range []string{"build", "test", "bench", "control"} {
		if !seen[target] {
			t.Errorf("make help does not list %s:\n%s", target, help)
		}
	}
}
