// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func id(name string) spiffeid.ID {
	return spiffeid.RequireFromString("spiffe://cluster.local/ns/demo/sa/" + name)
}

func TestEvaluate(t *testing.T) {
	rules := []Rule{
		{Name: "first", DenySource: []spiffeid.ID{id("batch"), id("old")}},
		{Name: "second", DenySource: []spiffeid.ID{id("old"), id("cron")}},
	}
	set := NewSet(rules)
	rules[0].DenySource[0] = id("web") // the set has its own

	allow := Verdict{Allow: true, Rule: RuleDefaultAllow}
	for name, tt := range map[string]struct {
		set  *Set
		conn Conn
		want Verdict
	}{
		"no set denies":             {nil, Conn{Dir: Inbound, SrcID: id("web")}, Verdict{Rule: RuleNone}},
		"no set denies outbound":    {nil, Conn{Dir: Outbound, SrcID: id("web")}, Verdict{Rule: RuleNone}},
		"no rule allows":            {NewSet(nil), Conn{Dir: Inbound, SrcID: id("batch")}, allow},
		"another source":            {set, Conn{Dir: Inbound, SrcID: id("web")}, allow},
		"a source that is denied":   {set, Conn{Dir: Inbound, SrcID: id("batch")}, Verdict{Rule: "first"}},
		"the first rule that holds": {set, Conn{Dir: Inbound, SrcID: id("old")}, Verdict{Rule: "first"}},
		"the second rule":           {set, Conn{Dir: Inbound, SrcID: id("cron")}, Verdict{Rule: "second"}},
		"at the source":             {set, Conn{Dir: Outbound, SrcID: id("batch")}, allow},
		"the destination":           {set, Conn{Dir: Inbound, SrcID: id("web"), DstID: id("batch")}, allow},
		"an unknown source":         {set, Conn{Dir: Inbound}, allow},
	} {
		t.Run(name, func(t *testing.T) {
			if got := Evaluate(tt.set, tt.conn); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestParseFile(t *testing.T) {
	f, err := ParseFile("p.yaml", []byte("rules:\n- name: no-batch\n  denySource: [spiffe://cluster.local/ns/demo/sa/batch]\n"))
	if err != nil {
		t.Fatal(err)
	}
	rules := f.Rules
	if len(rules) != 1 || rules[0].Name != "no-batch" || len(rules[0].DenySource) != 1 || rules[0].DenySource[0] != id("batch") {
		t.Errorf("got %+v", rules)
	}
	if f, err := ParseFile("p.yaml", nil); err != nil || len(f.Rules) != 0 || len(f.Modes) != 0 {
		t.Errorf("of nothing: %v, %v", f, err)
	}
}

func TestParseFileRefuses(t *testing.T) {
	const good = "  denySource: [spiffe://cluster.local/ns/demo/sa/batch]\n"
	const ids = "a SPIFFE ID, such as spiffe://cluster.local/ns/demo/sa/web"
	for name, tt := range map[string]struct{ data, want string }{
		"an unknown key":   {"rule: []\n", "p.yaml:1:1: rule: unknown key; did you mean rules?; allowed: modes, rules"},
		"an allow rule":    {"rules:\n- name: a\n  allowSource: []\n" + good, "p.yaml:3:3: rules[0].allowSource: unknown key; allowed: denySource, name"},
		"no name":          {"rules:\n-" + good[1:], "p.yaml:2:3: rules[0].name: is missing; allowed: a Kubernetes name: lower-case letters, digits, - and ., at most 253 of them"},
		"a name twice":     {"rules:\n- name: a\n" + good + "- name: a\n" + good, `p.yaml:4:9: rules[1].name: "a" is also that of line 2; allowed: each name once`},
		"a built-in name":  {"rules:\n- name: default-allow\n" + good, `p.yaml:2:9: rules[0].name: "default-allow" is built in; allowed: any other name`},
		"nothing denied":   {"rules:\n- name: a\n", "p.yaml:2:3: rules[0].denySource: is missing; allowed: one SPIFFE ID or more"},
		"an empty list":    {"rules:\n- name: a\n  denySource: []\n", "p.yaml:3:15: rules[0].denySource: is empty; allowed: one SPIFFE ID or more"},
		"no SPIFFE ID":     {"rules:\n- name: a\n  denySource: [batch]\n", `p.yaml:3:16: rules[0].denySource[0]: "batch" is not valid: scheme is missing or invalid; allowed: ` + ids},
		"a wildcard":       {"rules:\n- name: a\n  denySource: [spiffe://cluster.local/ns/demo/sa/*]\n", `p.yaml:3:16: rules[0].denySource[0]: "spiffe://cluster.local/ns/demo/sa/*" is not valid: path segment characters are limited to letters, numbers, dots, dashes, and underscores; allowed: ` + ids},
		"one, not a list":  {"rules:\n- name: a\n  denySource: spiffe://cluster.local/ns/demo/sa/batch\n", "p.yaml:3:15: rules[0].denySource: is text; allowed: a list in [ ] of: " + ids},
		"an empty rule":    {"rules:\n-\n", "p.yaml:2:2: rules[0]: is empty; allowed: a mapping (key: value)"},
		"rules as mapping": {"rules: {}\n", "p.yaml:1:1: rules: is a mapping; allowed: a list of mappings"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseFile("p.yaml", []byte(tt.data))
			if err == nil || got.Rules != nil || got.Modes != nil {
				t.Fatalf("got %v, %v", got, err)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}
