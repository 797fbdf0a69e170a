// SPDX-License-Identifier: Apache-2.0

package static

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config/strict"
	"github.com/culvert-mesh/culvert/pod"
)

func domain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString("cluster.local")
}

var _ pod.Source = (*Source)(nil)

func TestParseFile(t *testing.T) {
	got, err := ParseFile("p.yaml", []byte(`
pods:
- name: web
  netns: /run/netns/../netns/web
  addresses: [10.0.0.7]
- name: web
  namespace: demo
  serviceAccount: sa
  trustDomain: cluster.local
  uid: 3B0c-1
  netns: /proc/12/ns/net
  addresses: [fd00::8, 10.0.0.8]
`), domain())
	if err != nil {
		t.Fatal(err)
	}
	want := []pod.Pod{
		{Name: "web", Namespace: "default", ServiceAccount: "default", TrustDomain: "cluster.local", NetnsPath: "/run/netns/web", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.7")}},
		{Name: "web", Namespace: "demo", UID: "3B0c-1", ServiceAccount: "sa", TrustDomain: "cluster.local", NetnsPath: "/proc/12/ns/net", Addresses: []netip.Addr{netip.MustParseAddr("fd00::8"), netip.MustParseAddr("10.0.0.8")}},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestParseFileRefuses(t *testing.T) {
	const a = "- {name: a, netns: /run/netns/a, addresses: [10.0.0.1]}\n"
	const netns = "the absolute path of a network namespace, such as /run/netns/web"
	const reached = "an address that other nodes reach, such as 10.0.0.7 or fd00::7"
	for name, tt := range map[string]struct{ data, want string }{
		"an unknown key":         {"pod: []\n", "p.yaml:1:1: pod: unknown key; allowed: pods"},
		"another trust domain":   {"pods:\n- {name: b, netns: /b, addresses: [10.0.0.2], trustDomain: other.example}\n", `p.yaml:2:60: pods[0].trustDomain: "other.example" is another trust domain, for which this node has no authority; allowed: cluster.local, the mesh's own`},
		"an unknown item key":    {"pods:\n- {name: b, netns: /b, addresses: [10.0.0.2], pid: 1}\n", "p.yaml:2:47: pods[0].pid: unknown key; allowed: addresses, name, namespace, netns, serviceAccount, trustDomain, uid"},
		"no name":                {"pods:\n- {netns: /b, addresses: [10.0.0.2]}\n", "p.yaml:2:4: pods[0].name: is missing; allowed: a Kubernetes name: lower-case letters, digits, - and ., at most 253 of them"},
		"no namespace path":      {"pods:\n- {name: b, addresses: [10.0.0.2]}\n", "p.yaml:2:4: pods[0].netns: is missing; allowed: " + netns},
		"a relative path":        {"pods:\n- {name: b, netns: netns/b, addresses: [10.0.0.2]}\n", `p.yaml:2:20: pods[0].netns: "netns/b" is not valid; allowed: ` + netns},
		"no addresses":           {"pods:\n- {name: b, netns: /b}\n", "p.yaml:2:4: pods[0].addresses: is missing; allowed: one IP address, or one IPv4 and one IPv6 address"},
		"an empty list":          {"pods:\n- {name: b, netns: /b, addresses: []}\n", "p.yaml:2:35: pods[0].addresses: is empty; allowed: one IP address, or one IPv4 and one IPv6 address"},
		"two of a family":        {"pods:\n- {name: b, netns: /b, addresses: [10.0.0.2, 10.0.0.3]}\n", "p.yaml:2:46: pods[0].addresses[1]: 10.0.0.3 is the pod's second IPv4 address; allowed: the primary one only, beside one of the other family"},
		"a name twice":           {"pods:\n" + a + "- {name: a, netns: /b, addresses: [10.0.0.2]}\n", "p.yaml:3:10: pods[1].name: default/a is also that of line 2; allowed: each name once in a namespace"},
		"a namespace path twice": {"pods:\n" + a + "- {name: b, netns: /run//netns/a, addresses: [10.0.0.2]}\n", "p.yaml:3:20: pods[1].netns: /run/netns/a is also the namespace of line 2; allowed: a namespace that no other pod has"},
		"an address twice":       {"pods:\n" + a + "- {name: b, netns: /b, addresses: [10.0.0.1]}\n", "p.yaml:3:36: pods[1].addresses[0]: 10.0.0.1 is also an address of default/a; allowed: an address that no other pod has"},
		"a UID with a slash":     {"pods:\n- {name: b, uid: a/b, netns: /b, addresses: [10.0.0.1]}\n", `p.yaml:2:18: pods[0].uid: "a/b" is not valid; allowed: letters, digits, -, _, . and :, at most 128 of them`},
		"a loopback address":     {"pods:\n- {name: b, netns: /b, addresses: [\"::1\"]}\n", "p.yaml:2:36: pods[0].addresses[0]: ::1 is a loopback address; allowed: " + reached},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseFile("p.yaml", []byte(tt.data), domain())
			if err == nil || got != nil {
				t.Fatalf("got %v, %v", got, err)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestReloadKeepsThePodsWhenTheFileIsBroken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pods.yaml")
	write := func(data string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(path, domain()); err == nil {
		t.Fatal("a file that is not there is opened")
	}
	write("pods:\n- {name: a, netns: /a, addresses: [10.0.0.1]}\n")
	s, err := Open(path, domain())
	if err != nil {
		t.Fatal(err)
	}
	names := func() string {
		t.Helper()
		pods, err := s.Pods(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		all := ""
		for _, p := range pods {
			all += p.Name
		}
		return all
	}

	changed := s.Changed()
	write("pods: 5\n")
	if err := s.Reload(); err == nil {
		t.Error("a broken file is taken")
	}
	select {
	case <-changed:
		t.Error("a broken file is announced")
	default:
	}
	if got := names(); got != "a" {
		t.Errorf("pods %s", got)
	}

	write("pods:\n- {name: b, netns: /b, addresses: [10.0.0.1]}\n")
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("the change is not announced")
	}
	if got := names(); got != "b" {
		t.Errorf("pods %s", got)
	}
}

func TestWatchTakesChangesAndKeepsThePodsWhenTheFileIsBroken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pods.yaml")
	replace := func(data string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	replace("pods:\n- {name: a, netns: /a, addresses: [10.0.0.1]}\n")
	s, err := Open(path, domain())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	reports, done := make(chan error), make(chan struct{})
	go func() {
		defer close(done)
		s.Watch(ctx, func(err error) { reports <- err })
	}()
	defer func() { cancel(); <-done }()

	next := func() error {
		t.Helper()
		select {
		case err := <-reports:
			return err
		case <-time.After(10 * time.Second):
			t.Fatal("the change is not seen")
			return nil
		}
	}
	first := func() string {
		t.Helper()
		pods, err := s.Pods(t.Context())
		if err != nil || len(pods) != 1 {
			t.Fatalf("%v, %v", pods, err)
		}
		return pods[0].Name
	}
	changed := s.Changed()
	replace("pods:\n- {name: a, netns: b}\n")
	var wrong *strict.Error
	if err := next(); !errors.As(err, &wrong) || wrong.Line != 2 {
		t.Errorf("a broken file: %v", err)
	}
	select {
	case <-changed:
		t.Error("a broken file is announced")
	default:
	}
	if got := first(); got != "a" {
		t.Errorf("pod %s", got)
	}
	replace("pods:\n- {name: b, netns: /a, addresses: [10.0.0.1]}\n")
	if err := next(); err != nil {
		t.Error(err)
	}
	select {
	case <-changed:
	default:
		t.Error("the change is not announced")
	}
	if got := first(); got != "b" {
		t.Errorf("pod %s", got)
	}
}
