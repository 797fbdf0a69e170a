// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const header = "behaviour\tfamily\ttest\tcontrol\tstatus\n"

func TestRowsListedAsPassMustHold(t *testing.T) {
	const output = `
{"Action":"run","Package":"github.com/culvert-mesh/culvert/test/e2e","Test":"TestGood"}
{"Action":"pass","Package":"github.com/culvert-mesh/culvert/test/e2e","Test":"TestGood"}
FAIL some line of the tool
{"Action":"fail","Package":"github.com/culvert-mesh/culvert/test/e2e","Test":"TestBad"}
{"Action":"pass","Package":"github.com/culvert-mesh/culvert/test/e2e","Test":"TestBad"}
{"Action":"skip","Package":"github.com/culvert-mesh/culvert/test/e2e","Test":"TestSkipped"}
{"Action":"run","Package":"github.com/culvert-mesh/culvert/test/e2e","Test":"TestHangs"}
{"Action":"skip","Package":"github.com/culvert-mesh/culvert/test/e2e","Test":"TestPart/v6"}
{"Action":"pass","Package":"github.com/culvert-mesh/culvert/test/e2e","Test":"TestPart/v4"}
{"Action":"pass","Package":"github.com/culvert-mesh/culvert/test/e2e","Test":"TestPart"}
{"Action":"pass","Package":"github.com/culvert-mesh/culvert/redirect","Test":"TestElsewhere"}
`
	for name, c := range map[string]struct{ rows, want string }{
		"all hold":           {"a\tv4\tTestGood\tc\tpass\nb\t-\t./redirect:TestElsewhere\tc\tpass\nc\t-\tTestBad\tc\topen\n", ""},
		"part holds":         {"a\tv4\tTestPart/v4\tc\tpass\n", ""},
		"failed once":        {"a\tv4\tTestBad\tc\tpass\n", "1 rows"},
		"skipped":            {"a\tv4\tTestSkipped\tc\tpass\n", "1 rows"},
		"never ended":        {"a\tv4\tTestHangs\tc\tpass\n", "1 rows"},
		"missing":            {"a\tv4\tTestNowhere\tc\tpass\n", "1 rows"},
		"wrong folder":       {"a\tv4\tTestElsewhere\tc\tpass\n", "1 rows"},
		"a part was skipped": {"a\tboth\tTestPart\tc\tpass\n", "1 rows"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			table, log := filepath.Join(dir, "m.tsv"), filepath.Join(dir, "log")
			os.WriteFile(table, []byte(header+"# a comment\n"+c.rows), 0o600)
			os.WriteFile(log, []byte(output), 0o600)
			var out strings.Builder
			err := run(&out, table, false, []string{log})
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q\n%s", err, c.want, out.String())
			}
		})
	}
}

func TestBadTables(t *testing.T) {
	for name, text := range map[string]string{
		"empty":           "",
		"no header":       "a\tv4\tTestA\tc\tpass\n",
		"four columns":    header + "a\tv4\tTestA\tpass\n",
		"family":          header + "a\tv5\tTestA\tc\tpass\n",
		"status":          header + "a\tv4\tTestA\tc\tgood\n",
		"no control":      header + "a\tv4\tTestA\t\tpass\n",
		"not a test":      header + "a\tv4\tredirect:A\tc\tpass\n",
		"behaviour twice": header + "a\tv4\tTestA\tc\tpass\na\tv4\tTestB\tc\tpass\n",
	} {
		if _, err := readMatrix(strings.NewReader(text)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestOurTable(t *testing.T) {
	var out strings.Builder
	if err := run(&out, "../MATRIX.tsv", true, nil); err != nil {
		t.Fatal(err)
	}
	t.Log(out.String())
	f, err := os.Open("../MATRIX.tsv")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := readMatrix(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		if r.status == "pass" && !isWritten(t, r.key()) {
			t.Errorf("line %d: there is no %s", r.line, r.test)
		}
	}
}

// isWritten says whether the sources have a test's function.
func isWritten(t *testing.T, k key) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", "..", "..", strings.TrimPrefix(k.pkg, module), "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	name, _, _ := strings.Cut(k.test, "/")
	for _, f := range files {
		source, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(source), "\nfunc "+name+"(t *testing.T)") {
			return true
		}
	}
	return false
}

func TestWrittenTestsAreFound(t *testing.T) {
	for test, want := range map[string]bool{"TestOurTable": true, "TestOurTable/part": true, "TestOurTabl": false, "TestNowhere": false} {
		if got := isWritten(t, key{module + "test/e2e/matrix", test}); got != want {
			t.Errorf("%s: %v", test, got)
		}
	}
}
