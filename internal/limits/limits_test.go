// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"errors"
	"fmt"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const root = "../.."

// row is a constant that a table names, and the value that it gives.
type row struct {
	line  int
	pkg   string // its folder
	name  string
	value int64 // bytes, nanoseconds, or a number
}

var (
	named  = regexp.MustCompile("^`([a-z0-9/]+)\\.([A-Za-z0-9_]+)`$")
	valued = regexp.MustCompile(`^([0-9,]+)(?: (KiB|MiB|GiB|us|ms|s|min)\b)?`)
	units  = map[string]int64{"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "us": int64(time.Microsecond), "ms": int64(time.Millisecond), "s": int64(time.Second), "min": int64(time.Minute)}
)

// rows reads the tables. Their second column is the constant, the third its value.
func rows(page string) (out []row, err error) {
	for i, line := range strings.Split(page, "\n") {
		cells := strings.Split(strings.Trim(line, "|"), "|")
		if !strings.HasPrefix(line, "|") || len(cells) < 3 {
			continue
		}
		which, value := strings.TrimSpace(cells[1]), strings.TrimSpace(cells[2])
		if which == "" || which == "constant" || strings.Trim(which, "-") == "" {
			continue
		}
		n, v := named.FindStringSubmatch(which), valued.FindStringSubmatch(value)
		if n == nil || v == nil {
			err = errors.Join(err, fmt.Errorf("line %d: %s, %s: no constant and its value", i+1, which, value))
			continue
		}
		out = append(out, row{i + 1, n[1], n[2], number(v)})
	}
	return out, err
}

// number is what valued has found.
func number(v []string) int64 {
	n, _ := strconv.ParseInt(strings.ReplaceAll(v[1], ",", ""), 10, 64)
	return n * units[v[2]]
}

// sources evaluates constants of the project's packages.
type sources struct {
	fset     *token.FileSet
	importer types.Importer
	packages map[string]*types.Package
}

func newSources() *sources {
	fset := token.NewFileSet()
	return &sources{fset, importer.ForCompiler(fset, "source", nil), map[string]*types.Package{}}
}

// Import is types.Importer's: the standard library's time and our own packages are
// all that constants need. What else a package imports is left out, and what uses it
// is not checked.
func (s *sources) Import(path string) (*types.Package, error) {
	if path == "time" {
		return s.importer.Import(path)
	}
	if dir, ours := strings.CutPrefix(path, "github.com/culvert-mesh/culvert/"); ours {
		return s.load(dir)
	}
	return nil, errors.New("not needed")
}

func (s *sources) load(dir string) (*types.Package, error) {
	if known := s.packages[dir]; known != nil {
		return known, nil
	}
	paths, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	if err != nil {
		return nil, err
	}
	var files []*ast.File
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(s.fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("there is no package %s", dir)
	}
	c := types.Config{Importer: s, Error: func(error) {}, IgnoreFuncBodies: true}
	p, _ := c.Check(dir, s.fset, files, nil)
	s.packages[dir] = p
	return p, nil
}

// value is a constant's.
func (s *sources) value(dir, name string) (int64, error) {
	if dir == "bpf" {
		return defined(name)
	}
	p, err := s.load(dir)
	if err != nil {
		return 0, err
	}
	c, ok := p.Scope().Lookup(name).(*types.Const)
	if !ok {
		return 0, fmt.Errorf("%s has no constant %s", dir, name)
	}
	n, exact := constant.Int64Val(constant.ToInt(c.Val()))
	if !exact {
		return 0, fmt.Errorf("%s.%s is no whole number", dir, name)
	}
	return n, nil
}

var definition = regexp.MustCompile(`(?m)^#define (MAX_[A-Z_]+) ([^/\n]+?)\s*(?:/\*.*)?$`)

// defined is the value of a definition in the header of the programs.
func defined(name string) (int64, error) {
	text, err := os.ReadFile(filepath.Join(root, "bpf", "culvert.h"))
	if err != nil {
		return 0, err
	}
	all := map[string]string{}
	for _, d := range definition.FindAllStringSubmatch(string(text), -1) {
		all[d[1]] = d[2]
	}
	expr, ok := all[name]
	if !ok {
		return 0, fmt.Errorf("culvert.h does not define %s", name)
	}
	for other, value := range all {
		expr = strings.ReplaceAll(expr, other, value)
	}
	v, err := types.Eval(token.NewFileSet(), nil, token.NoPos, expr)
	if err != nil {
		return 0, err
	}
	n, _ := constant.Int64Val(v.Value)
	return n, nil
}

func page(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, "docs", "limits.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestLimitsHaveTheValuesThatStandThere(t *testing.T) {
	all, err := rows(page(t))
	if err != nil {
		t.Error(err)
	}
	if len(all) < 40 {
		t.Errorf("only %d constants are named", len(all))
	}
	s := newSources()
	for _, r := range all {
		got, err := s.value(r.pkg, r.name)
		if err != nil {
			t.Errorf("limits.md:%d: %v", r.line, err)
		} else if got != r.value {
			t.Errorf("limits.md:%d: %s.%s is %d, and not %d", r.line, r.pkg, r.name, got, r.value)
		}
	}
}

// Every bound of a map is on the page.
func TestEachMapIsNamed(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(root, "bpf", "*.[ch]"))
	if err != nil {
		t.Fatal(err)
	}
	all, _ := rows(page(t))
	bound := regexp.MustCompile(`max_entries, (MAX_[A-Z_]+)`)
	found := 0
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range bound.FindAllStringSubmatch(string(text), -1) {
			found++
			if !slices.ContainsFunc(all, func(r row) bool { return r.pkg == "bpf" && r.name == m[1] }) {
				t.Errorf("%s: %s is not on the page", path, m[1])
			}
		}
	}
	if found == 0 {
		t.Error("no map has a bound")
	}
}

// The oracle: it knows a wrong value, a constant that is gone, and a row that says
// neither.
func TestWrongRowsAreFound(t *testing.T) {
	got, err := rows("| what | constant | value |\n|---|---|---|\n| a | `tunnel.maxStreams` | 1,024 KiB |\n| b | `x` | 5 |\n| c | `tunnel.acceptPause` | 3 s |\n| d | | any |\n")
	if err == nil || len(got) != 2 || got[0].value != 1<<20 || got[1].value != int64(3*time.Second) {
		t.Errorf("read %v, %v", got, err)
	}
	s := newSources()
	if n, err := s.value("tunnel", "maxStreams"); err != nil || n == 1<<20 {
		t.Errorf("%d, %v", n, err)
	}
	for _, c := range [][2]string{{"tunnel", "noSuch"}, {"nowhere", "x"}, {"bpf", "MAX_NOTHING"}, {"tunnel", "errClosed"}} {
		if n, err := s.value(c[0], c[1]); err == nil {
			t.Errorf("%v is %d", c, n)
		}
	}
}
