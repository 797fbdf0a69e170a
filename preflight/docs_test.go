// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the table of checks into docs/preflight.md")

const (
	page  = "../docs/preflight.md"
	begin = "<!-- The checks: written from preflight by `go test ./preflight -update`. -->\n"
	end   = "<!-- End of the checks. -->\n"
)

// The table of the page is that of the checks.
func TestChecksAreDocumented(t *testing.T) {
	var b strings.Builder
	b.WriteString("\n| check | what it is for | without it | the mend | at a start |\n|---|---|---|---|---|\n")
	for _, c := range Checks() {
		start := ""
		if c.AtStart {
			start = "yes"
		}
		if c.Why == "" || c.Without == "" || c.Mend == "" {
			t.Errorf("%s: the page has nothing to say of it", c.Name)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", c.Name, c.Why, c.Without, c.Mend, start)
	}
	b.WriteString("\n")
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(data), begin)
	got, after, ended := strings.Cut(rest, end)
	switch {
	case !ok || !ended:
		t.Fatalf("%s has no place for the checks", page)
	case got == b.String():
	case *update:
		if err := os.WriteFile(page, []byte(before+begin+b.String()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("the checks of %s are not those of the code: run `go test ./preflight -update` (-want +got)\n%s", page, cmp.Diff(b.String(), got))
	}
}

// Checks are told apart by their names, and depend on such as are made before.
func TestChecksAreInOrder(t *testing.T) {
	seen, start := map[string]bool{}, map[string]bool{}
	for _, c := range Checks() {
		if seen[c.Name] {
			t.Errorf("%s is there twice", c.Name)
		}
		for _, need := range c.after {
			if !seen[need] || c.AtStart && !start[need] {
				t.Errorf("%s: what it needs, %s, is not looked at before", c.Name, need)
			}
		}
		seen[c.Name], start[c.Name] = true, c.AtStart
	}
}
