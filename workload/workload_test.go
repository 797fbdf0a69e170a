// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func domain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString("cluster.local")
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func TestParseFile(t *testing.T) {
	got, err := ParseFile("w.yaml", []byte(`
workloads:
- name: web
  addresses: [10.0.0.7]
- name: web
  namespace: demo
  serviceAccount: sa
  trustDomain: other.example
  node: n1
  uid: 3b0c
  protocol: tcp
  addresses: [10.0.0.8, fd00::8]
`), domain())
	if err != nil {
		t.Fatal(err)
	}
	want := []Workload{
		{UID: "default/web", Name: "web", Namespace: "default", ServiceAccount: "default", TrustDomain: "cluster.local", Addresses: addrs("10.0.0.7")},
		{UID: "3b0c", Name: "web", Namespace: "demo", ServiceAccount: "sa", TrustDomain: "other.example", Node: "n1", Addresses: addrs("10.0.0.8", "fd00::8"), Protocol: TCP},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Workload{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if _, err := NewTable(got); err != nil {
		t.Errorf("a file that is good makes no table: %v", err)
	}
}

func TestParseFileOfNothing(t *testing.T) {
	for _, data := range []string{"", "workloads:\n", "workloads: []\n"} {
		if got, err := ParseFile("w.yaml", []byte(data), domain()); err != nil || len(got) != 0 {
			t.Errorf("%q: %v, %v", data, got, err)
		}
	}
}

func TestParseFileRefuses(t *testing.T) {
	const names = "a Kubernetes name: lower-case letters, digits, - and ., at most 253 of them"
	const address = "an IP address, such as 10.0.0.7 or fd00::7"
	const reached = "an address that other nodes reach, such as 10.0.0.7 or fd00::7"
	for name, tt := range map[string]struct{ data, want string }{
		"an unknown key":      {"workload: []\n", "w.yaml:1:1: workload: unknown key; allowed: workloads"},
		"an unknown item key": {"workloads:\n- name: a\n  addresses: [10.0.0.1]\n  ip: x\n", "w.yaml:4:3: workloads[0].ip: unknown key; allowed: addresses, name, namespace, node, protocol, serviceAccount, trustDomain, uid"},
		"no name":             {"workloads:\n- addresses: [10.0.0.1]\n", "w.yaml:2:3: workloads[0].name: is missing; allowed: " + names},
		"no address":          {"workloads:\n- name: a\n", "w.yaml:2:3: workloads[0].addresses: is missing; allowed: one IP address or more"},
		"no addresses":        {"workloads:\n- name: a\n  addresses: []\n", "w.yaml:3:14: workloads[0].addresses: is empty; allowed: one IP address or more"},
		"a name":              {"workloads:\n- name: A\n  addresses: [10.0.0.1]\n", `w.yaml:2:9: workloads[0].name: "A" is not valid; allowed: ` + names},
		"a number as name":    {"workloads:\n- name: 5\n  addresses: [10.0.0.1]\n", `w.yaml:2:9: workloads[0].name: is a number, to YAML; quote it: "5"; allowed: ` + names},
		"a path in a name":    {"workloads:\n- name: a\n  serviceAccount: ../b\n  addresses: [10.0.0.1]\n", `w.yaml:3:19: workloads[0].serviceAccount: "../b" is not valid; allowed: ` + names},
		"a host name":         {"workloads:\n- name: a\n  addresses: [web.demo]\n", `w.yaml:3:15: workloads[0].addresses[0]: "web.demo" is not valid; allowed: ` + address},
		"a prefix":            {"workloads:\n- name: a\n  addresses: [10.0.0.0/8]\n", `w.yaml:3:15: workloads[0].addresses[0]: "10.0.0.0/8" is not valid; allowed: ` + address},
		"loopback":            {"workloads:\n- name: a\n  addresses: [127.0.0.1]\n", `w.yaml:3:15: workloads[0].addresses[0]: 127.0.0.1 is a loopback address; allowed: ` + reached},
		"multicast":           {"workloads:\n- name: a\n  addresses: [\"ff02::1\"]\n", `w.yaml:3:15: workloads[0].addresses[0]: ff02::1 is a multicast address; allowed: ` + reached},
		"unspecified":         {"workloads:\n- name: a\n  addresses: [0.0.0.0]\n", `w.yaml:3:15: workloads[0].addresses[0]: 0.0.0.0 is nobody's address; allowed: ` + reached},
		"link-local":          {"workloads:\n- name: a\n  addresses: [fe80::1]\n", `w.yaml:3:15: workloads[0].addresses[0]: fe80::1 is a link-local address; allowed: ` + reached},
		"a zone":              {"workloads:\n- name: a\n  addresses: [fd00::1%eth0]\n", `w.yaml:3:15: workloads[0].addresses[0]: fd00::1%eth0 has a zone; allowed: ` + reached},
		"mapped":              {"workloads:\n- name: a\n  addresses: [\"::ffff:10.0.0.1\"]\n", `w.yaml:3:15: workloads[0].addresses[0]: ::ffff:10.0.0.1 is an IPv4 address in IPv6 clothes; write it as IPv4; allowed: ` + address},
		"a protocol":          {"workloads:\n- name: a\n  protocol: http\n  addresses: [10.0.0.1]\n", `w.yaml:3:13: workloads[0].protocol: "http" is not known; allowed: hbone, tcp`},
		"a trust domain":      {"workloads:\n- name: a\n  trustDomain: spiffe://x\n  addresses: [10.0.0.1]\n", `w.yaml:3:16: workloads[0].trustDomain: "spiffe://x" is not valid; allowed: a SPIFFE trust domain in lower case, such as cluster.local`},
		"a name twice":        {"workloads:\n- name: a\n  addresses: [10.0.0.1]\n- name: a\n  addresses: [10.0.0.2]\n", `w.yaml:4:9: workloads[1].name: "default/a" is also that of line 2; allowed: each name once in a namespace, or a uid of its own`},
		"a UID twice":         {"workloads:\n- name: a\n  uid: x\n  addresses: [10.0.0.1]\n- name: b\n  uid: x\n  addresses: [10.0.0.2]\n", `w.yaml:6:8: workloads[1].uid: "x" is also that of line 2; allowed: each UID once`},
		"an address twice":    {"workloads:\n- name: a\n  addresses: [10.0.0.1]\n- name: b\n  addresses: [10.0.0.1]\n", `w.yaml:5:15: workloads[1].addresses[0]: 10.0.0.1 is also an address of default/a; allowed: an address that no other workload has`},
		"not a list":          {"workloads:\n  name: a\n", "w.yaml:1:1: workloads: is a mapping; allowed: a list of mappings"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseFile("w.yaml", []byte(tt.data), domain())
			if err == nil || got != nil {
				t.Fatalf("got %v, %v", got, err)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func web() Workload {
	return Workload{UID: "u", Name: "web", Namespace: "demo", ServiceAccount: "sa", TrustDomain: "cluster.local", Addresses: addrs("10.0.0.7", "fd00::7")}
}

func TestTable(t *testing.T) {
	list := []Workload{web()}
	table, err := NewTable(list)
	if err != nil {
		t.Fatal(err)
	}
	list[0].Name = "changed"
	list[0].Addresses[0] = netip.MustParseAddr("10.0.0.9")

	for _, a := range []string{"10.0.0.7", "::ffff:10.0.0.7", "fd00::7"} {
		w, ok := table.ByAddr(netip.MustParseAddr(a))
		if !ok || w.Name != "web" {
			t.Errorf("%s: %v, %t", a, w, ok)
			continue
		}
		if got, want := w.Identity().String(), "spiffe://cluster.local/ns/demo/sa/sa"; got != want {
			t.Errorf("identity %s, want %s", got, want)
		}
		if n := testing.AllocsPerRun(10, func() { w.Identity() }); n != 0 {
			t.Errorf("Identity allocates %.0f times", n)
		}
	}
	if _, ok := table.ByAddr(netip.MustParseAddr("10.0.0.9")); ok {
		t.Error("the table has changed with the list that it was made of")
	}
	if n := table.Len(); n != 1 {
		t.Errorf("%d workloads", n)
	}
	n := 0
	for w := range table.All() {
		n++
		if w.UID != "u" {
			t.Errorf("all: %v", w)
		}
	}
	if n != 1 {
		t.Errorf("all: %d", n)
	}
}

func TestNilTableIsEmpty(t *testing.T) {
	var table *Table
	if _, ok := table.ByAddr(netip.MustParseAddr("10.0.0.7")); ok || table.Len() != 0 {
		t.Error("it has something")
	}
	for range table.All() {
		t.Error("it has something")
	}
}

func TestNewTableRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Workload)
		want   string
	}{
		"no identity":      {func(w *Workload) { w.UID, w.Addresses, w.ServiceAccount = "v", nil, "" }, "make identity of namespace"},
		"no trust domain":  {func(w *Workload) { w.UID, w.Addresses, w.TrustDomain = "v", nil, "" }, "make identity of trust domain"},
		"a path traversal": {func(w *Workload) { w.UID, w.Addresses, w.Namespace = "v", nil, ".." }, "make identity of namespace"},
		"no UID":           {func(w *Workload) { w.UID, w.Addresses = "", nil }, "it has no UID"},
		"a UID twice":      {func(w *Workload) { w.Addresses = nil }, "UID u is also that of demo/web"},
		"an address twice": {func(w *Workload) { w.UID, w.Addresses = "v", addrs("::ffff:10.0.0.7") }, "address 10.0.0.7 is also that of demo/web"},
	} {
		t.Run(name, func(t *testing.T) {
			other := web()
			tt.change(&other)
			_, err := NewTable([]Workload{web(), other})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
	if bad := (&Workload{}).Identity(); !bad.IsZero() {
		t.Errorf("a workload of nothing is %s", bad)
	}
}
