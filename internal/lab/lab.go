// SPDX-License-Identifier: Apache-2.0

// Package lab builds nodes and pods out of network namespaces for tests, demo and benches: routed veths, no bridge, no
// address translation, both families, in an underlay where only pod and node addresses are ever seen. It starts a
// daemon per node (the real binary), reads its access log and metrics, and runs small applications in the pods.
//
// Everything is written down in a state directory as it is made, so that Sweep can remove what a killed run has left.
// A Lab is closed by who made it. Needs root.
package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// StateDir holds a directory per lab, named <prefix>-<id>.
const StateDir = "/run/culvert-lab"

// The bounds come from the address plan: the third byte is the node, the last one ten more than the pod.
const (
	maxNodes       = 100
	maxPodsPerNode = 200
)

// PodCIDRs hold the addresses of all pods of all labs.
func PodCIDRs() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("10.77.0.0/16"), netip.MustParsePrefix("fd77::/64")}
}

// Config says what to build.
type Config struct {
	// Nodes is the number of nodes. 0: 2.
	Nodes int
	// PodsPerNode is the number of pods on each node. 0: 2.
	PodsPerNode int
	// Prefix begins the names of namespaces and of the state directory; Sweep goes by it. Empty: "culvert".
	Prefix string
	// OwnCgroup has the lab's processes live in a cgroup v2 of the lab, which is the one that its daemons hook: no other
	// process of the machine meets their hooks. Off: the daemons hook the root.
	OwnCgroup bool
}

// Lab is a set of nodes, connected pairwise.
type Lab struct {
	// ID is <prefix>-<random>; the namespaces are <ID>-n1, <ID>-n1p1 and so on.
	ID string
	// Dir is the state directory: configuration, logs, CA files, captures. Removed by Close.
	Dir   string
	Nodes []*Node

	cfg     Config
	journal *journal
	cgroup  string // the directory, with OwnCgroup

	mu     sync.Mutex // guards what follows
	apps   []*App
	rooted bool // the root is made
}

// Node is a node: a network namespace that routes between its pods and the other nodes.
type Node struct {
	Name   string
	Number int // from 1
	NS     *netns.NS
	Pods   []*Pod
	// Addrs are the node's addresses, IPv4 first.
	Addrs []netip.Addr
	// Dir holds the node's configuration and logs.
	Dir string

	lab     *Lab
	netns   string
	daemons []*Daemon
}

// Pod is a pod: a network namespace with eth0 and the default route to its node.
type Pod struct {
	Name, Namespace, ServiceAccount string
	Node                            *Node
	Number                          int // from 1
	NS                              *netns.NS
	// V4 and V6 are its addresses.
	V4, V6 netip.Addr

	netns string
	fresh map[string]string // sysctls as they were before any daemon
}

// New builds a lab. When it fails it leaves nothing.
func New(ctx context.Context, cfg Config) (*Lab, error) {
	if cfg.Nodes == 0 {
		cfg.Nodes = 2
	}
	if cfg.PodsPerNode == 0 {
		cfg.PodsPerNode = 2
	}
	if cfg.Prefix == "" {
		cfg.Prefix = "culvert"
	}
	if cfg.Nodes < 0 || cfg.Nodes > maxNodes || cfg.PodsPerNode < 0 || cfg.PodsPerNode > maxPodsPerNode {
		return nil, fmt.Errorf("build lab: at most %d nodes with %d pods each", maxNodes, maxPodsPerNode)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("build lab: network namespaces need root: run it with sudo")
	}
	var id [3]byte
	rand.Read(id[:])
	l := &Lab{ID: cfg.Prefix + "-" + hex.EncodeToString(id[:]), cfg: cfg}
	l.Dir = filepath.Join(StateDir, l.ID)
	if err := l.build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("build lab: %w", err), l.Close())
	}
	return l, nil
}

func (l *Lab) build(ctx context.Context) error {
	if err := os.MkdirAll(l.Dir, 0o700); err != nil {
		return err
	}
	var err error
	if l.journal, err = openJournal(l.Dir); err != nil {
		return err
	}
	if l.cfg.OwnCgroup {
		if err := l.makeCgroup(); err != nil {
			return err
		}
	}
	for i := 1; i <= l.cfg.Nodes; i++ {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := l.addNode(i); err != nil {
			return fmt.Errorf("node %d: %w", i, err)
		}
	}
	for i, a := range l.Nodes {
		for _, b := range l.Nodes[i+1:] {
			if err := connect(a, b); err != nil {
				return fmt.Errorf("connect %s to %s: %w", a.Name, b.Name, err)
			}
		}
	}
	return nil
}

func (l *Lab) addNode(number int) error {
	n := &Node{
		Name: fmt.Sprintf("node%d", number), Number: number, lab: l,
		Addrs: []netip.Addr{
			netip.AddrFrom4([4]byte{10, 76, 0, byte(number)}),
			v6(0xfd76, 0, uint16(number)),
		},
		netns: fmt.Sprintf("%s-n%d", l.ID, number),
	}
	n.Dir = filepath.Join(l.Dir, n.Name)
	if err := os.MkdirAll(n.Dir, 0o700); err != nil {
		return err
	}
	l.Nodes = append(l.Nodes, n)
	var err error
	if n.NS, err = l.namespace(n.netns); err != nil {
		return err
	}
	if err := n.NS.Do(setUpNode); err != nil {
		return err
	}
	for i := 1; i <= l.cfg.PodsPerNode; i++ {
		p := &Pod{
			Name:           fmt.Sprintf("pod%d-%d", number, i),
			Namespace:      "demo",
			ServiceAccount: fmt.Sprintf("sa%d-%d", number, i),
			Node:           n, Number: i,
			V4:    netip.AddrFrom4([4]byte{10, 77, byte(number), byte(10 + i)}),
			V6:    v6(0xfd77, uint16(number), uint16(i)),
			netns: fmt.Sprintf("%s-n%dp%d", l.ID, number, i),
		}
		n.Pods = append(n.Pods, p)
		if p.NS, err = l.namespace(p.netns); err != nil {
			return err
		}
		if err := attach(n, p); err != nil {
			return fmt.Errorf("pod %d: %w", i, err)
		}
		if err := p.NS.Do(func() (err error) { p.fresh, err = readSysctls(); return err }); err != nil {
			return fmt.Errorf("pod %d: %w", i, err)
		}
	}
	return nil
}

// namespace makes a namespace, having written down that it will.
func (l *Lab) namespace(name string) (*netns.NS, error) {
	if err := l.journal.add("netns", name); err != nil {
		return nil, err
	}
	return netns.CreateNamed(name)
}

// v6 returns prefix::high:low.
func v6(prefix, high, low uint16) netip.Addr {
	var a [16]byte
	a[0], a[1] = byte(prefix>>8), byte(prefix)
	a[12], a[13] = byte(high>>8), byte(high)
	a[14], a[15] = byte(low>>8), byte(low)
	return netip.AddrFrom16(a)
}

// Pod returns a pod by the numbers of its node and of itself, both from 1.
func (l *Lab) Pod(node, pod int) *Pod { return l.Nodes[node-1].Pods[pod-1] }

// Pods returns all pods, node by node.
func (l *Lab) Pods() []*Pod {
	var out []*Pod
	for _, n := range l.Nodes {
		out = append(out, n.Pods...)
	}
	return out
}

// Close ends what runs in the lab and removes it: applications, daemons (cleaned up by the binary's own cleanup),
// processes, namespaces, state directory. It goes on past errors and may be called again.
func (l *Lab) Close() error {
	l.mu.Lock()
	apps := l.apps
	l.apps = nil
	l.mu.Unlock()
	var errs []error
	for _, a := range slices.Backward(apps) {
		errs = append(errs, a.Close())
	}
	for _, n := range l.Nodes {
		for _, d := range slices.Backward(n.daemons) {
			errs = append(errs, d.Close())
		}
	}
	for _, n := range l.Nodes {
		for _, p := range n.Pods {
			if p.NS != nil {
				errs = append(errs, p.NS.Close())
				p.NS = nil
			}
		}
		if n.NS != nil {
			errs = append(errs, n.NS.Close())
			n.NS = nil
		}
	}
	if l.journal != nil {
		errs = append(errs, l.journal.Close())
		l.journal = nil
		errs = append(errs, undo(context.Background(), l.Dir))
	}
	return errors.Join(errs...)
}

// NetnsPath returns where the pod's network namespace is mounted.
func (p *Pod) NetnsPath() string { return filepath.Join(netnsDir, p.netns) }

// NetnsPath returns where the node's network namespace is mounted.
func (n *Node) NetnsPath() string { return filepath.Join(netnsDir, n.netns) }

// Addrs returns the pod's addresses, IPv4 first.
func (p *Pod) Addrs() []netip.Addr { return []netip.Addr{p.V4, p.V6} }

// Addr returns the pod's address of a family: 4 or 6.
func (p *Pod) Addr(family int) netip.Addr {
	if family == 6 {
		return p.V6
	}
	return p.V4
}

// Identity returns the SPIFFE ID that the pod has in the lab's trust domain.
func (p *Pod) Identity() string {
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", TrustDomain, p.Namespace, p.ServiceAccount)
}

// Uplink returns the name of the interface by which a node reaches another.
func (n *Node) Uplink(to *Node) string { return fmt.Sprintf("u%d", to.Number) }

// HostEnd returns the name of the node's end of a pod's veth.
func (p *Pod) HostEnd() string { return fmt.Sprintf("p%d", p.Number) }

// Do runs f with only the network namespace of the pod entered. Sockets made in f stay in it; goroutines started in f
// do not.
func (p *Pod) Do(f func() error) error { return p.NS.Do(f) }

// Do runs f in the node's network namespace.
func (n *Node) Do(f func() error) error { return n.NS.Do(f) }
