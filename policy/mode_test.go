// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The precedence is that of Istio's PeerAuthentication.
func TestMode(t *testing.T) {
	ports := map[uint16]Mode{8080: Strict, 9090: Permissive}
	web := ModeRule{Name: "web", Namespace: "demo", Workload: "web", Mode: Permissive, Ports: ports}
	onlyPorts := ModeRule{Name: "web", Namespace: "demo", Workload: "web", Ports: ports}
	demo := ModeRule{Name: "demo", Namespace: "demo", Mode: Permissive}
	mesh := ModeRule{Name: "mesh", Mode: Permissive}
	strictMesh := ModeRule{Name: "mesh", Mode: Strict}
	for name, tt := range map[string]struct {
		set  *Set
		ns   string
		port uint16
		mode Mode
		rule string
	}{
		"no set":                                   {nil, "demo", 80, Strict, RuleNone},
		"no modes":                                 {NewSet(nil), "demo", 80, Strict, RuleDefaultMode},
		"the configuration's":                      {NewSet(nil, DefaultMode(Permissive)), "demo", 80, Permissive, RuleDefaultMode},
		"a file's for the mesh":                    {NewSet(nil, DefaultMode(Permissive), strictMesh), "demo", 80, Strict, "mesh"},
		"the namespace before the mesh":            {NewSet(nil, strictMesh, demo), "demo", 80, Permissive, "demo"},
		"another namespace":                        {NewSet(nil, strictMesh, demo), "other", 80, Strict, "mesh"},
		"the workload before the namespace":        {NewSet(nil, mesh, ModeRule{Name: "demo", Namespace: "demo", Mode: Strict}, web), "demo", 80, Permissive, "web"},
		"a workload of another namespace":          {NewSet(nil, web), "other", 80, Strict, RuleDefaultMode},
		"another workload":                         {NewSet(nil, ModeRule{Name: "db", Namespace: "demo", Workload: "db", Mode: Permissive}), "demo", 80, Strict, RuleDefaultMode},
		"a port before its workload":               {NewSet(nil, mesh, demo, web), "demo", 8080, Strict, "web"},
		"a port of a workload without a mode":      {NewSet(nil, onlyPorts), "demo", 9090, Permissive, "web"},
		"another port of it is the namespace's":    {NewSet(nil, strictMesh, demo, onlyPorts), "demo", 80, Permissive, "demo"},
		"another port of it is the mesh's":         {NewSet(nil, mesh, onlyPorts), "demo", 80, Permissive, "mesh"},
		"a strict port stays strict in a loose ns": {NewSet(nil, mesh, demo, onlyPorts), "demo", 8080, Strict, "web"},
	} {
		t.Run(name, func(t *testing.T) {
			if m, rule := tt.set.Mode(tt.ns, "web", tt.port); m != tt.mode || rule != tt.rule {
				t.Errorf("got %s by %s, want %s by %s", m, rule, tt.mode, tt.rule)
			}
		})
	}
	ports[8080] = Permissive // the set has its own
	set := NewSet(nil, mesh, web)
	ports[8080] = Strict
	set.Modes()[1].Ports[8080] = Strict
	if m, _ := set.Mode("demo", "web", 8080); m != Permissive {
		t.Error("the set changed with what it was made of, or gave away")
	}
}

func TestPlainPorts(t *testing.T) {
	mesh := DefaultMode(Permissive)
	ports := map[uint16]Mode{8080: Strict, 443: Strict, 9090: Permissive}
	for name, tt := range map[string]struct {
		set  *Set
		want PlainPorts
	}{
		"no set":                    {nil, PlainPorts{}},
		"strict":                    {NewSet(nil), PlainPorts{}},
		"permissive":                {NewSet(nil, mesh), PlainPorts{All: true}},
		"permissive but for some":   {NewSet(nil, mesh, ModeRule{Name: "w", Namespace: "demo", Workload: "web", Ports: ports}), PlainPorts{All: true, Ports: []uint16{443, 8080}}},
		"strict but for one":        {NewSet(nil, ModeRule{Name: "w", Namespace: "demo", Workload: "web", Ports: ports}), PlainPorts{Ports: []uint16{9090}}},
		"another workload's ports":  {NewSet(nil, ModeRule{Name: "w", Namespace: "demo", Workload: "db", Ports: ports}), PlainPorts{}},
		"of a workload's own mode":  {NewSet(nil, mesh, ModeRule{Name: "w", Namespace: "demo", Workload: "web", Mode: Strict, Ports: ports}), PlainPorts{Ports: []uint16{9090}}},
		"of the namespace's":        {NewSet(nil, mesh, ModeRule{Name: "n", Namespace: "demo", Mode: Strict}), PlainPorts{}},
		"the same mode as the rest": {NewSet(nil, ModeRule{Name: "w", Namespace: "demo", Workload: "web", Ports: map[uint16]Mode{80: Strict}}), PlainPorts{}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tt.set.PlainPorts("demo", "web"); !got.Equal(tt.want) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

// What both take is what each takes, for every pair and port.
func TestBothIsTheIntersection(t *testing.T) {
	takes := func(p PlainPorts, port uint16) bool {
		listed := false
		for _, n := range p.Ports {
			listed = listed || n == port
		}
		return p.All != listed
	}
	var all []PlainPorts
	for _, every := range []bool{false, true} {
		for _, ports := range [][]uint16{nil, {1}, {2}, {1, 2}, {2, 3}, {1, 2, 3}} {
			all = append(all, PlainPorts{every, ports})
		}
	}
	for _, p := range all {
		for _, q := range all {
			both := p.Both(q)
			for port := uint16(1); port < 6; port++ {
				if got, want := takes(both, port), takes(p, port) && takes(q, port); got != want {
					t.Fatalf("%+v and %+v are %+v: port %d is %v", p, q, both, port, got)
				}
			}
		}
	}
}

func TestEvaluatePlain(t *testing.T) {
	deny := Rule{Name: "no-batch", DenySource: []spiffeid.ID{id("batch")}}
	mode := ModeRule{Name: "legacy", Namespace: "demo", Workload: "web", Mode: Permissive, Ports: map[uint16]Mode{8080: Strict}}
	set := NewSet([]Rule{deny}, mode)
	to := func(port uint16) Conn {
		return Conn{Dir: Inbound, Dst: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port)}
	}
	for name, tt := range map[string]struct {
		set      *Set
		workload string
		conn     Conn
		want     Verdict
	}{
		"no set":                           {nil, "web", to(80), Verdict{Rule: RuleNone}},
		"strict":                           {set, "db", to(80), Verdict{Rule: RuleDefaultMode}},
		"a strict port":                    {set, "web", to(8080), Verdict{Rule: "legacy"}},
		"no identity is denied by no rule": {set, "web", to(80), Verdict{Allow: true, Rule: "legacy"}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := EvaluatePlain(tt.set, "demo", tt.workload, tt.conn); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestParseModes(t *testing.T) {
	f, err := ParseFile("p.yaml", []byte(`modes:
- {name: mesh, mode: strict}
- {name: demo, namespace: demo, mode: permissive}
- {name: legacy, namespace: demo, workload: web, mode: permissive, ports: {8080: strict}}
- name: ports
  namespace: demo
  workload: db
  ports:
    5432: permissive
    "9090": strict
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []ModeRule{
		{Name: "mesh", Mode: Strict},
		{Name: "demo", Namespace: "demo", Mode: Permissive},
		{Name: "legacy", Namespace: "demo", Workload: "web", Mode: Permissive, Ports: map[uint16]Mode{8080: Strict}},
		{Name: "ports", Namespace: "demo", Workload: "db", Ports: map[uint16]Mode{5432: Permissive, 9090: Strict}},
	}
	if diff := cmp.Diff(want, f.Modes); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestParseModesRefuses(t *testing.T) {
	const port, mode = "a port from 1 to 65535", "strict, permissive"
	for name, tt := range map[string]struct{ data, want string }{
		"an unknown key":        {"- {name: a, mode: strict, port: 5}", "p.yaml:2:27: modes[0].port: unknown key; did you mean ports?; allowed: mode, name, namespace, ports, workload"},
		"no name":               {"- {mode: strict}", "p.yaml:2:4: modes[0].name: is missing; allowed: a Kubernetes name: lower-case letters, digits, - and ., at most 253 of them"},
		"a built-in name":       {"- {name: default-mode, mode: strict}", `p.yaml:2:10: modes[0].name: "default-mode" is built in; allowed: any other name`},
		"a name twice":          {"- {name: a, mode: strict}\n- {name: a, namespace: b, mode: strict}", `p.yaml:3:10: modes[1].name: "a" is also that of line 2; allowed: each name once`},
		"a rule's name":         {"- {name: a, mode: strict}\nrules:\n- {name: a, denySource: [spiffe://a/b]}", `p.yaml:2:10: modes[0].name: "a" is also that of line 4; allowed: each name once`},
		"another mode":          {"- {name: a, mode: disable}", `p.yaml:2:19: modes[0].mode: "disable" is not known; allowed: ` + mode},
		"nothing said":          {"- {name: a}", "p.yaml:2:4: modes[0].mode: is missing; allowed: mode, ports or both"},
		"no namespace":          {"- {name: a, workload: web, mode: strict}", "p.yaml:2:23: modes[0].workload: has no namespace; allowed: the namespace of the workload beside it"},
		"ports of a namespace":  {"- {name: a, namespace: b, ports: {80: strict}}", "p.yaml:2:27: modes[0].ports: has no workload; allowed: ports beside a workload; a namespace and the mesh have one mode for all"},
		"a workload twice":      {"- {name: a, namespace: b, workload: c, mode: strict}\n- {name: d, namespace: b, workload: c, ports: {80: strict}}", "p.yaml:3:37: modes[1].workload: it is for the same as the one of line 2; join the two; allowed: one mode for each workload, for each namespace, and for the mesh"},
		"a namespace twice":     {"- {name: a, namespace: b, mode: strict}\n- {name: d, namespace: b, mode: permissive}", "p.yaml:3:24: modes[1].namespace: it is for the same as the one of line 2; join the two; allowed: one mode for each workload, for each namespace, and for the mesh"},
		"the mesh twice":        {"- {name: a, mode: strict}\n- {name: d, mode: permissive}", "p.yaml:3:10: modes[1].name: it is for the same as the one of line 2; join the two; allowed: one mode for each workload, for each namespace, and for the mesh"},
		"port 0":                {"- {name: a, namespace: b, workload: c, ports: {0: strict}}", `p.yaml:2:48: modes[0].ports.0: "0" is not valid; allowed: ` + port},
		"a port too high":       {"- {name: a, namespace: b, workload: c, ports: {65536: strict}}", `p.yaml:2:48: modes[0].ports.65536: "65536" is not valid; allowed: ` + port},
		"a port's name":         {"- {name: a, namespace: b, workload: c, ports: {http: strict}}", `p.yaml:2:48: modes[0].ports.http: "http" is not valid; allowed: ` + port},
		"a port in octal":       {"- {name: a, namespace: b, workload: c, ports: {0100: strict}}", `p.yaml:2:48: modes[0].ports.0100: "0100" is not valid; allowed: ` + port},
		"a port twice":          {"- {name: a, namespace: b, workload: c, ports: {80: strict, 80: permissive}}", `p.yaml:2:60: modes[0].ports.80: is given twice, first in line 2; allowed: each key once`},
		"a port's unknown mode": {"- {name: a, namespace: b, workload: c, ports: {80: off}}", `p.yaml:2:52: modes[0].ports.80: "off" is not known; allowed: ` + mode},
		"a port's list":         {"- {name: a, namespace: b, workload: c, ports: {80: [strict]}}", `p.yaml:2:52: modes[0].ports.80: is a list; allowed: ` + mode},
		"ports as a list":       {"- {name: a, namespace: b, workload: c, ports: [80]}", "p.yaml:2:47: modes[0].ports: is a list; allowed: a mapping, each key a port from 1 to 65535, each value one of " + mode},
		"no ports":              {"- {name: a, namespace: b, workload: c, ports: {}}", "p.yaml:2:40: modes[0].ports: is empty; allowed: a mapping, each key a port from 1 to 65535, each value one of " + mode},
		"ports of nothing":      {"- {name: a, namespace: b, workload: c, ports: }", "p.yaml:2:40: modes[0].ports: is empty; allowed: a mapping, each key a port from 1 to 65535, each value one of " + mode},
		"modes as mapping":      {"  a: strict", "p.yaml:1:1: modes: is a mapping; allowed: a list of mappings"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseFile("p.yaml", []byte("modes:\n"+tt.data+"\n"))
			if err == nil || got.Modes != nil {
				t.Fatalf("got %v, %v", got, err)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}
