// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config/strict"
)

func compare(t *testing.T, want, got *Config) {
	t.Helper()
	opts := cmp.Options{
		cmp.AllowUnexported(spiffeid.TrustDomain{}),
		cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmpopts.EquateEmpty(),
	}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestParseOfNothingIsTheDefault(t *testing.T) {
	got, err := Parse("/etc/culvert/config.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Default("/etc/culvert")
	want.Path = "/etc/culvert/config.yaml"
	compare(t, want, got)
	if got.Pods.File != "/etc/culvert/pods.yaml" || got.Mode != ModeStrict || got.Tunnel.DeadAfter != 20*time.Second {
		t.Errorf("defaults are not those documented: %+v", got)
	}
}

const everything = `
node: {name: n1}
runDir: run
trustDomain: example.org
identity:
  ca: {dir: ../ca, leafTTL: 2h}
  trustFile: trust.yaml
workloads: {file: w.yaml}
pods: {file: /p.yaml}
policy: {file: policy.yaml}
mesh: {cidrs: [10.0.0.0/8, "fd00::/8"]}
bypass: {cidrs: [10.9.0.0/16]}
mode: strict
existing: reset
seccomp: log
loops: 3
cgroup: /sys/fs/cgroup/kubepods
metrics: {address: "[::1]:9000"}
accessLog: {format: text, queue: 9}
log: {level: debug, format: json}
tunnel: {idle: 1m, handshakeTimeout: 2s, connectTimeout: 3s, pingAfter: 4s, deadAfter: 5s, memory: 64}
`

func TestParseReadsEveryKey(t *testing.T) {
	got, err := Parse("/etc/culvert/config.yaml", []byte(everything))
	if err != nil {
		t.Fatal(err)
	}
	compare(t, &Config{
		Path:        "/etc/culvert/config.yaml",
		Node:        Node{Name: "n1"},
		RunDir:      "/etc/culvert/run",
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
		Identity:    Identity{CA: CA{Dir: "/etc/ca", LeafTTL: 2 * time.Hour}, TrustFile: "/etc/culvert/trust.yaml"},
		Workloads:   Workloads{File: "/etc/culvert/w.yaml"},
		Pods:        Pods{File: "/p.yaml"},
		Policy:      Policy{File: "/etc/culvert/policy.yaml"},
		Mesh:        Mesh{CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}},
		Bypass:      Bypass{CIDRs: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}},
		Mode:        ModeStrict,
		Existing:    ExistingReset,
		Seccomp:     SeccompLog,
		Loops:       3,
		Cgroup:      "/sys/fs/cgroup/kubepods",
		Metrics:     Metrics{Address: netip.MustParseAddrPort("[::1]:9000")},
		AccessLog:   AccessLog{Format: FormatText, Queue: 9},
		Log:         Log{Level: slog.LevelDebug, Format: FormatJSON},
		Tunnel:      Tunnel{Idle: time.Minute, HandshakeTimeout: 2 * time.Second, ConnectTimeout: 3 * time.Second, PingAfter: 4 * time.Second, DeadAfter: 5 * time.Second, Memory: 64},
	}, got)
}

func TestYAMLReadsBack(t *testing.T) {
	for name, data := range map[string]string{"default": "", "everything": everything, "odd names": "node: {name: \"5\"}\nrunDir: \"a: b # c\"\n"} {
		t.Run(name, func(t *testing.T) {
			want, err := Parse("/etc/culvert/config.yaml", []byte(data))
			if err != nil {
				t.Fatal(err)
			}
			b, err := want.YAML()
			if err != nil {
				t.Fatal(err)
			}
			got, err := Parse("/etc/culvert/config.yaml", b)
			if err != nil {
				t.Fatalf("%v in\n%s", err, b)
			}
			compare(t, want, got)
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for name, tt := range map[string]struct{ data, want string }{
		"an unknown key":         {"mod: strict\n", "c.yaml:1:1: mod: unknown key; did you mean mode?; allowed: accessLog, bypass, cgroup, existing, identity, log, loops, mesh, metrics, mode, node, pods, policy, runDir, seccomp, trustDomain, tunnel, workloads"},
		"an unknown inner key":   {"identity:\n  ca:\n    ttl: 1h\n", "c.yaml:3:5: identity.ca.ttl: unknown key; allowed: dir, leafTTL"},
		"another mode":           {"mode: disable\n", `c.yaml:1:7: mode: "disable" is not known; allowed: strict, permissive`},
		"a node name":            {"node: {name: a b}\n", `c.yaml:1:14: node.name: "a b" is not valid; allowed: a host name, such as node-1`},
		"an empty path":          {"runDir: \"\"\n", "c.yaml:1:9: runDir: is empty; allowed: the path of a folder"},
		"a trust domain":         {"trustDomain: Cluster.local\n", `c.yaml:1:14: trustDomain: "Cluster.local" is not valid; allowed: a SPIFFE trust domain in lower case, such as cluster.local`},
		"an ID as trust domain":  {"trustDomain: spiffe://a/b\n", `c.yaml:1:14: trustDomain: "spiffe://a/b" is not valid; allowed: a SPIFFE trust domain in lower case, such as cluster.local`},
		"a short life":           {"identity:\n  ca: {leafTTL: 1ms}\n", `c.yaml:2:17: identity.ca.leafTTL: "1ms" is not valid; allowed: a duration with a unit, from 1s to 2160h, such as 10s or 5m`},
		"a prefix":               {"mesh: {cidrs: [10.0.0.0/33]}\n", `c.yaml:1:16: mesh.cidrs[0]: "10.0.0.0/33" is not valid; allowed: address ranges, such as 10.0.0.0/8 or fd00::/8`},
		"a prefix's host bits":   {"bypass:\n  cidrs:\n  - fd00::/8\n  - 10.0.0.1/8\n", `c.yaml:4:5: bypass.cidrs[1]: "10.0.0.1/8" has bits beyond its length; did you mean 10.0.0.0/8?; allowed: address ranges, such as 10.0.0.0/8 or fd00::/8`},
		"a mapped prefix":        {"mesh: {cidrs: [\"::ffff:10.0.0.0/104\"]}\n", `c.yaml:1:16: mesh.cidrs[0]: "::ffff:10.0.0.0/104" is an IPv4 range in IPv6 clothes; write it as IPv4; allowed: address ranges, such as 10.0.0.0/8 or fd00::/8`},
		"IPv6 with a last colon": {"mesh: {cidrs: [fd00::]}\n", `c.yaml:1:16: mesh.cidrs[0]: is a mapping (quote a value that has a colon); allowed: address ranges, such as 10.0.0.0/8 or fd00::/8`},
		"negative loops":         {"loops: -1\n", `c.yaml:1:8: loops: "-1" is not valid; allowed: a whole number of loops from 0 to 1024`},
		"an address":             {"metrics: {address: localhost}\n", `c.yaml:1:20: metrics.address: "localhost" is not an address and a port; allowed: address:port, such as 127.0.0.1:15020 or [::]:15020`},
		"an access log format":   {"accessLog: {format: xml}\n", `c.yaml:1:21: accessLog.format: "xml" is not known; allowed: auto, json, text`},
		"an access log queue":    {"accessLog: {queue: 0}\n", `c.yaml:1:20: accessLog.queue: "0" is not valid; allowed: a whole number of lines from 1 to 1048576`},
		"a log level":            {"log: {level: INFO}\n", `c.yaml:1:14: log.level: "INFO" is not known; allowed: debug, info, warn, error`},
		"no unit":                {"tunnel:\n  idle: 300\n", `c.yaml:2:9: tunnel.idle: "300" is not valid; allowed: a duration with a unit, from 100ms to 24h, such as 10s or 5m`},
		"dead before the ping":   {"tunnel:\n  pingAfter: 30s\n", `c.yaml:2:14: tunnel.pingAfter: deadAfter is 20s, pingAfter 30s; allowed: deadAfter longer than pingAfter`},
		"the tunnel's port":      {"tunnel: {port: 1}\n", "c.yaml:1:10: tunnel.port: unknown key; allowed: connectTimeout, deadAfter, handshakeTimeout, idle, memory, pingAfter"},
		"a cgroup list":          {"cgroup: [a]\n", `c.yaml:1:9: cgroup: is a list; allowed: the path of a folder of cgroup v2, or "" for its root`},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Parse("c.yaml", []byte(tt.data))
			var located *strict.Error
			if !errors.As(err, &located) || c != nil {
				t.Fatalf("got %v, %v", c, err)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestLoadResolvesFromTheFilesFolder(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, []byte("pods: {file: p.yaml}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(dir, "p.yaml"); c.Pods.File != want || c.Path != path {
		t.Errorf("pods at %s, config at %s; want %s, %s", c.Pods.File, c.Path, want, path)
	}
}

func TestLoadOfAMissingFileSaysWhatToDo(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "none.yaml"))
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "none.yaml") || !strings.Contains(err.Error(), "--config") {
		t.Errorf("got %v", err)
	}
}
