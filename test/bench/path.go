// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// path is a way that pods' connections can go.
type path interface {
	// missing says what there has to be before it can be measured; empty: nothing.
	missing() string
	// about says in a line what it is, with its version.
	about() string
	// carry starts what carries the connections of some of a node's pods, and
	// adds it to the site's proxies.
	carry(ctx context.Context, s *site, n *lab.Node, pods []*lab.Pod) error
}

// binaries are the programs that paths need. An empty one is looked for.
type binaries struct{ culvert, envoy, haproxy, ghostunnel, ztunnel string }

func (b *binaries) flags(f *flag.FlagSet) {
	f.StringVar(&b.culvert, "ztunnel", "bin/ztunnel", "Culvert's daemon")
	f.StringVar(&b.envoy, "envoy", first(os.Getenv("PEER_ENVOY"), "out/peers/envoy"), "Envoy, as scripts/peers brings it, or PEER_ENVOY")
	f.StringVar(&b.haproxy, "haproxy", first(os.Getenv("PEER_HAPROXY"), "haproxy"), "HAProxy, or PEER_HAPROXY")
	f.StringVar(&b.ghostunnel, "ghostunnel", first(os.Getenv("PEER_GHOSTUNNEL"), "out/peers/ghostunnel"), "ghostunnel, as scripts/bench-peers builds it, or PEER_GHOSTUNNEL")
	f.StringVar(&b.ztunnel, "istio-ztunnel", os.Getenv("PEER_ZTUNNEL"), "Istio's ztunnel, or PEER_ZTUNNEL")
}

func first(all ...string) string {
	for _, s := range all {
		if s != "" {
			return s
		}
	}
	return ""
}

// namedPath is a path with the name that its column has.
type namedPath struct {
	name string
	path path
}

// paths are all, in the order of their columns.
func (b binaries) paths() []namedPath {
	return []namedPath{
		{"direct", direct{}},
		{"culvert", culvert{binary: b.culvert}},
		{"envoy", sidecar{program: b.envoy, kind: envoy{}}},
		{"ztunnel", ambient{binary: b.ztunnel}},
		{"haproxy", sidecar{program: b.haproxy, kind: haproxy{}}},
		{"ghostunnel", sidecar{program: b.ghostunnel, kind: ghostunnel{}}},
		{"culvert-sidecar", culvert{binary: b.culvert, sidecar: true}},
	}
}

func pathNames() (names []string) {
	for _, p := range (binaries{}).paths() {
		names = append(names, p.name)
	}
	return names
}

// choose returns the paths of a list of names, in the order of the columns.
func (b binaries) choose(list string) ([]namedPath, error) {
	want := map[string]bool{}
	for name := range strings.SplitSeq(list, ",") {
		want[strings.TrimSpace(name)] = true
	}
	var out []namedPath
	for _, p := range b.paths() {
		if want[p.name] {
			out = append(out, p)
			delete(want, p.name)
		}
	}
	for name := range want {
		return nil, fmt.Errorf("there is no path %q: there are %s", name, strings.Join(pathNames(), ", "))
	}
	return out, nil
}

// find makes a program's path absolute.
func find(program string) (string, error) {
	found, err := exec.LookPath(program)
	if err != nil {
		return "", err
	}
	return filepath.Abs(found)
}

// firstLine is what a program says of its version.
func firstLine(program string, args ...string) string {
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

// direct is nothing at all: TCP between namespaces.
type direct struct{}

func (direct) missing() string { return "" }

func (direct) about() string { return "TCP between the namespaces, in plaintext: the limit" }

func (direct) carry(context.Context, *site, *lab.Node, []*lab.Pod) error { return nil }

// culvert is ours: a daemon for all pods of a node, or one for each.
type culvert struct {
	binary  string
	sidecar bool
}

func (c culvert) missing() string {
	if _, err := find(c.binary); err != nil {
		return fmt.Sprintf("Culvert is not built: make build (%v)", err)
	}
	return ""
}

func (c culvert) about() string {
	version := firstLine(c.binary, "version")
	if c.sidecar {
		return version + ", a daemon in each pod's namespace"
	}
	return version + ", a daemon on each node"
}

func (c culvert) carry(ctx context.Context, s *site, n *lab.Node, pods []*lab.Pod) error {
	groups := [][]*lab.Pod{pods}
	if c.sidecar {
		groups = nil
		for _, p := range pods {
			groups = append(groups, []*lab.Pod{p})
		}
	}
	for _, group := range groups {
		d, err := n.StartDaemon(ctx, lab.DaemonConfig{
			Binary: c.binary, Pods: group, Sidecar: c.sidecar, Workloads: s.workloads,
		})
		if err != nil {
			return err
		}
		s.daemons = append(s.daemons, d)
		s.proxies = append(s.proxies, proxy{n, d.PID()})
	}
	return nil
}
