// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// bound is a row of the table of what peers control.
type bound struct {
	line      int
	constants [][2]string // package's folder, name
	value     string
	tests     [][2]string // package's folder, name
}

var (
	boundConstant = regexp.MustCompile("`([a-z0-9]+)\\.([A-Za-z0-9]+)`")
	boundTest     = regexp.MustCompile("`([a-z0-9/]+):(Test[A-Za-z0-9]+)`")
)

// folder is a package's by its last name.
func folder(pkg string) string {
	for _, dir := range []string{"tunnel/" + pkg, pkg} {
		if found, _ := filepath.Glob(filepath.Join(root, dir, "*.go")); len(found) > 0 {
			return dir
		}
	}
	return ""
}

// bounds reads the table below its heading. Its columns: what, constants, value,
// what happens, tests.
func bounds(page string) (out []bound, err error) {
	_, section, _ := strings.Cut(page, "\n## Bounds\n")
	first := strings.Count(page[:len(page)-len(section)], "\n") + 1
	section, _, _ = strings.Cut(section, "\n## ")
	for i, line := range strings.Split(section, "\n") {
		cells := strings.Split(strings.Trim(line, "|"), "|")
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| what |") {
			continue
		}
		b := bound{line: first + i}
		if len(cells) != 5 {
			err = errors.Join(err, fmt.Errorf("line %d has %d columns", b.line, len(cells)))
			continue
		}
		b.value = strings.TrimSpace(cells[2])
		for _, m := range boundConstant.FindAllStringSubmatch(cells[1], -1) {
			b.constants = append(b.constants, [2]string{folder(m[1]), m[2]})
		}
		for _, m := range boundTest.FindAllStringSubmatch(cells[4], -1) {
			b.tests = append(b.tests, [2]string{m[1], m[2]})
		}
		if len(b.constants) == 0 || len(b.tests) == 0 {
			err = errors.Join(err, fmt.Errorf("line %d has %d constants and %d tests", b.line, len(b.constants), len(b.tests)))
		}
		out = append(out, b)
	}
	return out, err
}

// tested is the text of a package's tests.
func tested(dir string) (string, error) {
	files, err := filepath.Glob(filepath.Join(root, dir, "*_test.go"))
	if err != nil {
		return "", err
	}
	var all strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		all.Write(b)
	}
	return all.String(), nil
}

// lacks says what a row promises and the source has not.
func (s *sources) lacks(b bound) (err error) {
	for _, c := range b.constants {
		got, verr := s.value(c[0], c[1])
		if verr != nil {
			err = errors.Join(err, verr)
			continue
		}
		if v := valued.FindStringSubmatch(b.value); v != nil && len(b.constants) == 1 {
			if want := number(v); got != want {
				err = errors.Join(err, fmt.Errorf("%s.%s is %d, and not %d", c[0], c[1], got, want))
			}
		}
	}
	names := false
	for _, test := range b.tests {
		text, terr := tested(test[0])
		if terr != nil {
			return errors.Join(err, terr)
		}
		if !strings.Contains(text, "\nfunc "+test[1]+"(t *testing.T)") {
			err = errors.Join(err, fmt.Errorf("%s has no test %s", test[0], test[1]))
		}
		// One of another package, of the whole, knows no constant.
		names = names || !slices.ContainsFunc(b.constants, func(c [2]string) bool {
			return c[0] == test[0] && !strings.Contains(strings.ToLower(text), strings.ToLower(c[1]))
		})
	}
	if !names {
		err = errors.Join(err, fmt.Errorf("no test names %v", b.constants))
	}
	return err
}

func TestEachBoundOnPeersIsTested(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "docs", "wire.md"))
	if err != nil {
		t.Fatal(err)
	}
	all, err := bounds(string(page))
	if err != nil {
		t.Error(err)
	}
	if len(all) < 35 {
		t.Errorf("only %d bounds", len(all))
	}
	s := newSources()
	for _, b := range all {
		if err := s.lacks(b); err != nil {
			t.Errorf("wire.md:%d: %v", b.line, err)
		}
	}
}

// The oracle: it knows a row without a test or a constant, a wrong value, and names
// that are not there.
func TestWrongBoundsAreFound(t *testing.T) {
	const head = "# Page\n\n## Bounds\n\n| what | constant | value | what happens beyond | test |\n|---|---|---|---|---|\n"
	const good = "| good | `tunnel.maxHandshakes` | 512 | reset | `tunnel:TestHandshakeLimits` |\n"
	s := newSources()
	all, err := bounds(head + good + "\n## Next\n\n| other | table |\n")
	if err != nil || len(all) != 1 || s.lacks(all[0]) != nil {
		t.Fatalf("%v, %v, %v", all, err, s.lacks(all[0]))
	}
	for _, row := range []string{
		"| no test | `tunnel.maxHandshakes` | 512 | reset | |\n",
		"| no constant | | 512 | reset | `tunnel:TestHandshakeLimits` |\n",
		"| a column too few | `tunnel.maxHandshakes` | 512 | `tunnel:TestHandshakeLimits` |\n",
	} {
		if _, err := bounds(head + good + row); err == nil {
			t.Errorf("passes: %s", row)
		}
	}
	for _, row := range []string{
		"| another value | `tunnel.maxHandshakes` | 513 | reset | `tunnel:TestHandshakeLimits` |\n",
		"| no such constant | `tunnel.noSuch` | 512 | reset | `tunnel:TestHandshakeLimits` |\n",
		"| no such test | `tunnel.maxHandshakes` | 512 | reset | `tunnel:TestNoSuch` |\n",
		"| of a test that is another's | `tunnel.closeCode` | 512 | reset | `tunnel:TestHandshakeLimits` |\n",
	} {
		all, err := bounds(head + row)
		if err != nil || len(all) != 1 || s.lacks(all[0]) == nil {
			t.Errorf("passes: %s%v", row, err)
		}
	}
}
