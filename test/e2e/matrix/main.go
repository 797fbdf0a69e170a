// SPDX-License-Identifier: Apache-2.0

// Command matrix holds MATRIX.tsv against what the tests did. It reads the output of "go test -json" from a file, or
// from standard input, and fails when a row that is listed as pass failed, was skipped, in part or whole, or
// did not run. It says how many rows are open.
//
//	go test -json ./test/e2e/... | go run ./test/e2e/matrix
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

const (
	module         = "github.com/culvert-mesh/culvert/"
	defaultPackage = "test/e2e"
)

func main() {
	path := flag.String("matrix", "test/e2e/MATRIX.tsv", "the table")
	lint := flag.Bool("lint", false, "check the table only, read no test output")
	output := flag.String("results", "", "the output of go test -json; empty: standard input")
	flag.Parse()
	files := flag.Args()
	if *output != "" {
		files = append(files, *output)
	}
	if err := run(os.Stdout, *path, *lint, files); err != nil {
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(1)
	}
}

func run(w io.Writer, path string, lint bool, files []string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	rows, err := readMatrix(f)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	results := make(results)
	switch {
	case lint:
		fmt.Fprintln(w, summary(rows))
		return nil
	case len(files) == 0:
		if err := results.read(os.Stdin); err != nil {
			return err
		}
	}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = results.read(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	broken, ripe := judge(rows, results)
	for _, r := range ripe {
		fmt.Fprintf(w, "passes, and may be listed so: line %d: %s\n", r.line, r)
	}
	for _, b := range broken {
		fmt.Fprintf(w, "%s:%d: %s: %s\n", path, b.row.line, b.row, b.why)
	}
	fmt.Fprintln(w, summary(rows))
	if len(broken) > 0 {
		return fmt.Errorf("%d rows listed as pass do not hold", len(broken))
	}
	return nil
}

// row is a line of the table.
type row struct {
	line                                     int
	behaviour, family, test, control, status string
}

func (r row) String() string { return fmt.Sprintf("%s [%s] (%s)", r.behaviour, r.family, r.test) }

// key names the row's test as go test does: package, test.
func (r row) key() key {
	if pkg, test, ok := strings.Cut(r.test, ":"); ok {
		return key{module + strings.TrimPrefix(pkg, "./"), test}
	}
	return key{module + defaultPackage, r.test}
}

var (
	columns  = []string{"behaviour", "family", "test", "control", "status"}
	families = []string{"v4", "v6", "mapped", "both", "-"}
	statuses = []string{"open", "pass"}
)

func readMatrix(r io.Reader) ([]row, error) {
	var rows []row
	seen := make(map[[2]string]int)
	s := bufio.NewScanner(r)
	for line := 1; s.Scan(); line++ {
		text := s.Text()
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		cells := strings.Split(text, "\t")
		if len(cells) != len(columns) {
			return nil, fmt.Errorf("line %d: %d columns, want %d: %s", line, len(cells), len(columns), strings.Join(columns, ", "))
		}
		if line == 1 {
			if !slices.Equal(cells, columns) {
				return nil, fmt.Errorf("line 1: want the columns' names: %s", strings.Join(columns, ", "))
			}
			continue
		}
		for i, c := range cells {
			if strings.TrimSpace(c) != c || c == "" {
				return nil, fmt.Errorf("line %d: %s is empty or has spaces around it", line, columns[i])
			}
		}
		x := row{line, cells[0], cells[1], cells[2], cells[3], cells[4]}
		if !slices.Contains(families, x.family) {
			return nil, fmt.Errorf("line %d: family %q, want one of %s", line, x.family, strings.Join(families, ", "))
		}
		if !slices.Contains(statuses, x.status) {
			return nil, fmt.Errorf("line %d: status %q, want one of %s", line, x.status, strings.Join(statuses, ", "))
		}
		if !strings.HasPrefix(x.key().test, "Test") {
			return nil, fmt.Errorf("line %d: test %q is none: TestName, or folder:TestName", line, x.test)
		}
		id := [2]string{x.behaviour, x.family}
		if at, twice := seen[id]; twice {
			return nil, fmt.Errorf("line %d: the same behaviour and family as line %d", line, at)
		}
		seen[id] = line
		rows = append(rows, x)
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if len(rows) == 0 {
		return nil, errors.New("no rows")
	}
	return rows, nil
}

type key struct{ pkg, test string }

// result says how often a test ended in which way, over all runs in the input.
type result struct{ pass, fail, skip int }

type results map[key]*result

func (all results) read(r io.Reader) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 16<<20) // a line of test output
	for s.Scan() {
		var e struct{ Action, Package, Test string }
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			continue // what the compiler or the shell says in between
		}
		if e.Test == "" {
			continue
		}
		k := key{e.Package, e.Test}
		if all[k] == nil {
			all[k] = new(result) // from its "run" on: a test that never ends has no pass
		}
		switch e.Action {
		case "pass":
			all[k].pass++
		case "fail":
			all[k].fail++
		case "skip":
			all[k].skip++
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("read test output: %w", err)
	}
	return nil
}

// of says what became of a test and of its subtests; empty: it passed, whole.
func (all results) of(k key) string {
	switch r := all[k]; {
	case r == nil:
		return "did not run"
	case r.fail > 0:
		return "failed"
	case r.skip > 0:
		return "was skipped"
	case r.pass == 0:
		return "did not end"
	}
	for sub, r := range all {
		if sub.pkg != k.pkg || !strings.HasPrefix(sub.test, k.test+"/") {
			continue
		}
		if r.fail > 0 || r.skip > 0 || r.pass == 0 {
			return sub.test + " failed, was skipped or did not end"
		}
	}
	return ""
}

type breach struct {
	row row
	why string
}

// judge returns the rows listed as pass that do not hold, and the open ones that do.
func judge(rows []row, all results) (broken []breach, ripe []row) {
	for _, r := range rows {
		why := all.of(r.key())
		switch {
		case r.status == "pass" && why != "":
			broken = append(broken, breach{r, why})
		case r.status == "open" && why == "":
			ripe = append(ripe, r)
		}
	}
	return broken, ripe
}

func summary(rows []row) string {
	open := 0
	for _, r := range rows {
		if r.status == "open" {
			open++
		}
	}
	return fmt.Sprintf("%d rows: %d pass, %d open", len(rows), len(rows)-open, open)
}
