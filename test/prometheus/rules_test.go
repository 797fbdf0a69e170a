// SPDX-License-Identifier: Apache-2.0

package prometheus

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What an operator loads.
const (
	rulesFile     = "../../deploy/prometheus/rules.yaml"
	dashboardFile = "../../deploy/prometheus/dashboard.json"
)

// The alerts fire for what they are for, and for nothing else, as promtool says of
// deploy/prometheus/rules_test.yaml. Each has its runbook.
func TestRules(t *testing.T) {
	promtool := program(t, "promtool")
	test := strings.TrimSuffix(rulesFile, ".yaml") + "_test.yaml"
	for _, args := range [][]string{{"check", "rules", rulesFile}, {"test", "rules", test}} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	rules, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile(test)
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../docs/runbooks.md")
	if err != nil {
		t.Fatal(err)
	}
	alerts := regexp.MustCompile(`(?m)^ +- alert: (\w+)$`).FindAllStringSubmatch(string(rules), -1)
	if len(alerts) == 0 {
		t.Error("there are no alerts")
	}
	for _, a := range alerts {
		if !bytes.Contains(page, []byte("\n## "+a[1]+"\n")) {
			t.Errorf("docs/runbooks.md has nothing of %s", a[1])
		}
		if n := strings.Count(string(tests), "alertname: "+a[1]+"\n"); n < 2 {
			t.Errorf("%s has %d tests, want one that fires and a control", a[1], n)
		}
	}

	// The control: promtool notices a bound that is another.
	dir := t.TempDir()
	wrong := bytes.Replace(rules, []byte(" == 0"), []byte(" == 2"), 1)
	for name, content := range map[string][]byte{"rules.yaml": wrong, "rules_test.yaml": tests} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if exec.Command(promtool, "test", "rules", filepath.Join(dir, "rules_test.yaml")).Run() == nil {
		t.Error("control: a rule that never fires has passed")
	}
}

// The dashboard is one that Grafana can read: JSON, and each panel with a query.
func TestDashboard(t *testing.T) {
	b, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Title  string
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	if d.Title == "" || len(d.Panels) == 0 {
		t.Error("it is empty")
	}
	for _, p := range d.Panels {
		if p.Title == "" || len(p.Targets) == 0 || p.Targets[0].Expr == "" {
			t.Errorf("panel %q asks for nothing", p.Title)
		}
	}
}
