// SPDX-License-Identifier: Apache-2.0

// Package redirect steers the connections of enrolled pods to the tunnel: it
// loads the programs of package bpf, attaches and pins them, fills their maps,
// and sets each pod's rules, routes and sysctls.
//
// A Node is what the node's pods share: the connect hooks and the maps. A Pod
// is one network namespace. What is pinned stays when the process ends, so that
// captured connections are then refused and never passed on in plaintext; Pod
// Release and Cleanup take it away. The package knows no workload and no
// policy: it gets plain values.
package redirect

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/bpf"
)

// layout is the version of what is pinned. A version with other maps takes
// another number, and converts or refuses what it finds, but never misreads it.
const layout = "v3"

// Config says where things are.
type Config struct {
	RunDir string       // lock, and what release needs; "": /run/culvert
	BPFFS  string       // "": /sys/fs/bpf; mounted when it is not, below RunDir where that fails
	Cgroup string       // cgroup v2 that holds the pods' processes, a directory or its path in the hierarchy; "": the v2 root
	Logger *slog.Logger // nil: none
}

func (c *Config) setDefaults() error {
	if c.RunDir == "" {
		c.RunDir = "/run/culvert"
	}
	abs, err := filepath.Abs(c.RunDir)
	if err != nil {
		return fmt.Errorf("find run directory: %w", err)
	}
	c.RunDir = abs
	if c.BPFFS == "" {
		c.BPFFS = defaultBPFFS
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Destination says what is done with connections to an address.
type Destination uint32

// The kinds of destinations, enum destination of bpf/culvert.h.
const (
	DestinationHBONE  Destination = 1 // carried
	DestinationTCP    Destination = 2 // passed on in plaintext, counted
	DestinationRefuse Destination = 3 // refused in connect()
)

// Node is the redirection of one node.
type Node struct {
	cfg    Config
	lock   *os.File
	pins   string // directory
	cgroup string // where the hooks are, in the hierarchy
	// cgroupDir is the directory of that.
	cgroupDir string
	maps      bpf.ConnectMaps
	links     []link.Link

	decisions []string // names, in the order of the map

	mu           sync.Mutex                   // guards what follows
	destinations map[netip.Addr]Destination   // what is in the map; nil: not read yet
	plain        map[uint64]map[uint16]uint32 // likewise, plain_ports, by namespace
	pods         map[uint64]*Pod              // by the cookie of their namespace
	mesh, bypass []netip.Prefix               // what is in the maps of ranges
	foreign      map[ebpf.ProgramID]bool      // programs that were warned of
}

// Open loads the programs and attaches them to the cgroup, or takes over what a
// previous process has pinned. It refuses to run beside another one of the same
// run directory. What the machine lacks for it, package preflight says better.
func Open(cfg Config) (_ *Node, err error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, pods: map[uint64]*Pod{}, foreign: map[ebpf.ProgramID]bool{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if n.lock, err = takeLock(cfg.RunDir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(cfg.RunDir, podsDir), 0o700); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	if n.pins, err = makePinDir(cfg); err != nil {
		return nil, err
	}
	cgroup, path, err := FindCgroup(cfg.Cgroup)
	if err != nil {
		return nil, err
	}
	n.cgroup, n.cgroupDir = path, cgroup
	if err := n.load(cgroup); err != nil {
		return nil, err
	}
	return n, nil
}

func (n *Node) load(cgroup string) error {
	spec, err := bpf.LoadConnect()
	if err != nil {
		return fmt.Errorf("read BPF programs: %w", err)
	}
	if n.decisions, err = readDecisions(spec); err != nil {
		return err
	}
	for _, m := range spec.Maps {
		if !strings.HasPrefix(m.Name, ".") {
			m.Pinning = ebpf.PinByName
		}
	}
	var objects bpf.ConnectObjects
	err = spec.LoadAndAssign(&objects, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: n.pins}})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return fmt.Errorf("load BPF programs: %s holds maps of another layout: run `ztunnel cleanup` with the version that made them: %w", n.pins, err)
	}
	if err != nil {
		return fmt.Errorf("load BPF programs: %w", err)
	}
	n.maps = objects.ConnectMaps
	defer objects.ConnectPrograms.Close() // the links hold them
	if err := n.checkCounters(); err != nil {
		return err
	}
	for i, prog := range []*ebpf.Program{objects.Capture4, objects.Capture6, objects.Keep} {
		l, err := attachCgroup(filepath.Join(n.pins, hooks[i]), cgroup, attachTypes[i], prog)
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", hooks[i], cgroup, err)
		}
		n.links = append(n.links, l)
	}
	return n.checkHooks()
}

// attachCgroup attaches a program, in place of the one that a pinned link
// holds where there is one, so that there is no time without either.
func attachCgroup(pin, cgroup string, attach ebpf.AttachType, prog *ebpf.Program) (link.Link, error) {
	old, err := link.LoadPinnedLink(pin, nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return pinCgroup(pin, cgroup, attach, prog)
	case err != nil:
		return nil, err
	}
	if isAt(old, cgroup) && old.Update(prog) == nil {
		return old, nil
	}
	// The cgroup is gone, or another is configured. Both hooks may run for a
	// while, and say the same.
	defer old.Close()
	if err := os.Remove(pin); err != nil {
		return nil, err
	}
	return pinCgroup(pin, cgroup, attach, prog)
}

func pinCgroup(pin, cgroup string, attach ebpf.AttachType, prog *ebpf.Program) (link.Link, error) {
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: attach, Program: prog})
	if err != nil {
		return nil, err
	}
	if err := l.Pin(pin); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// isAt says whether a link is attached to a cgroup: its number is the inode's
// (kernfs).
func isAt(l link.Link, cgroup string) bool {
	info, err := l.Info()
	if err != nil || info.Cgroup() == nil {
		return false
	}
	var st unix.Stat_t
	return unix.Stat(cgroup, &st) == nil && info.Cgroup().CgroupId == st.Ino
}

// Close closes the process's handles, the pods' among them. What is pinned
// stays, and goes on refusing. Idempotent.
func (n *Node) Close() error {
	var errs []error
	n.mu.Lock()
	for _, p := range n.pods {
		errs = append(errs, p.close())
	}
	n.pods = nil
	n.mu.Unlock()
	for _, l := range n.links {
		errs = append(errs, l.Close())
	}
	n.links = nil
	errs = append(errs, n.maps.Close())
	if n.lock != nil {
		errs = append(errs, n.lock.Close())
		n.lock = nil
	}
	return errors.Join(errs...)
}

// claim makes p the node's pod of its name and namespace.
func (n *Node) claim(p *Pod) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pods == nil {
		return errors.New("the node is closed")
	}
	cookie := p.cfg.NS.Cookie()
	o, ok := n.pods[cookie]
	if !ok {
		o, ok = n.named(p.cfg.Name)
	}
	if ok {
		return fmt.Errorf("pod %s is there already, with the namespace %s", o.cfg.Name, o.cfg.NetnsPath)
	}
	n.pods[cookie] = p
	return nil
}

// named finds a pod by its name. The caller holds the lock.
func (n *Node) named(name string) (*Pod, bool) {
	for _, p := range n.pods {
		if p.cfg.Name == name {
			return p, true
		}
	}
	return nil, false
}

func (n *Node) disown(p *Pod) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if cookie := p.cfg.NS.Cookie(); n.pods[cookie] == p {
		delete(n.pods, cookie)
	}
}

// Cgroup is where the hooks are attached, as /proc/PID/cgroup has it.
func (n *Node) Cgroup() string { return n.cgroup }

// CgroupDir is the directory of that.
func (n *Node) CgroupDir() string { return n.cgroupDir }

// Pins is the directory of what is pinned: culvert/<instance>/<layout> of a bpffs.
func (n *Node) Pins() string { return n.pins }

// Own marks a socket as the tunnel's: the hooks leave it alone. Sockets that it
// accepts inherit that.
func (n *Node) Own(fd int) error {
	if err := n.maps.OwnSockets.Put(uint32(fd), uint32(1)); err != nil {
		return fmt.Errorf("mark socket as the tunnel's: %w", err)
	}
	return nil
}

// SetDestinations says what is done with connections to these addresses, and
// that all others are unknown. Live connections are not touched.
func (n *Node) SetDestinations(want map[netip.Addr]Destination) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.destinations == nil { // perhaps taken over
		have := map[netip.Addr]Destination{}
		var key [16]byte
		var value uint32
		it := n.maps.Destinations.Iterate()
		for it.Next(&key, &value) {
			have[netip.AddrFrom16(key).Unmap()] = Destination(value)
		}
		if err := it.Err(); err != nil {
			return fmt.Errorf("read destinations: %w", err)
		}
		n.destinations = have
	}
	for a, d := range want {
		a = a.Unmap()
		if n.destinations[a] == d {
			continue
		}
		if err := n.maps.Destinations.Put(a.As16(), uint32(d)); err != nil {
			return fmt.Errorf("set destination %s: %w", a, full(err, n.maps.Destinations, "addresses"))
		}
		n.destinations[a] = d
	}
	known := make(map[netip.Addr]bool, len(want))
	for a := range want {
		known[a.Unmap()] = true
	}
	for a := range n.destinations {
		if known[a] {
			continue
		}
		if err := n.maps.Destinations.Delete(a.As16()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove destination %s: %w", a, err)
		}
		delete(n.destinations, a)
	}
	return nil
}

// full says of an error that a map is full, where it is that.
func full(err error, m *ebpf.Map, of string) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("no more than %d %s are possible: %w", m.MaxEntries(), of, err)
	}
	return err
}

// SetMeshCIDRs sets the ranges inside which an unknown address is refused.
func (n *Node) SetMeshCIDRs(ranges []netip.Prefix) error {
	if err := setRanges(n.maps.MeshCidrs, ranges); err != nil {
		return fmt.Errorf("set mesh ranges: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mesh = unmapped(ranges)
	return nil
}

// SetBypass sets the ranges that are left alone.
func (n *Node) SetBypass(ranges []netip.Prefix) error {
	if err := setRanges(n.maps.Bypass, ranges); err != nil {
		return fmt.Errorf("set bypassed ranges: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.bypass = unmapped(ranges)
	return nil
}

// rangeKey is struct cidr of bpf/culvert.h.
type rangeKey struct {
	Bits   uint32
	Family uint32
	Addr   [16]byte
}

func keyOf(r netip.Prefix) (rangeKey, error) {
	if a := r.Addr(); a.Is4In6() {
		if r.Bits() < 96 {
			return rangeKey{}, fmt.Errorf("%s is neither of IPv4 nor of IPv6", r)
		}
		r = netip.PrefixFrom(a.Unmap(), r.Bits()-96)
	}
	if !r.IsValid() {
		return rangeKey{}, errors.New("a prefix is not valid")
	}
	k := rangeKey{Bits: 32 + uint32(r.Bits()), Family: unix.AF_INET6, Addr: r.Masked().Addr().As16()}
	if r.Addr().Is4() {
		k.Bits += 96
		k.Family = unix.AF_INET
	}
	return k, nil
}

// unmapped has ranges of IPv4 as such. keyOf has taken each.
func unmapped(ranges []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(ranges))
	for _, r := range ranges {
		if a := r.Addr(); a.Is4In6() {
			r = netip.PrefixFrom(a.Unmap(), r.Bits()-96)
		}
		out = append(out, r.Masked())
	}
	return out
}

func setRanges(m *ebpf.Map, ranges []netip.Prefix) error {
	want := make(map[rangeKey]bool, len(ranges))
	for _, r := range ranges {
		k, err := keyOf(r)
		if err != nil {
			return err
		}
		want[k] = true
		if err := m.Put(k, uint32(1)); err != nil {
			return fmt.Errorf("add %s: %w", r, full(err, m, "ranges"))
		}
	}
	var have []rangeKey
	var k rangeKey
	var v uint32
	it := m.Iterate()
	for it.Next(&k, &v) {
		have = append(have, k)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read ranges: %w", err)
	}
	for _, k := range have {
		if !want[k] {
			if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("remove a range: %w", err)
			}
		}
	}
	return nil
}

// instance tells the pins of several daemons of one machine apart: each has a
// run directory of its own (absolute).
func instance(runDir string) string {
	sum := sha256.Sum256([]byte(runDir))
	return hex.EncodeToString(sum[:6])
}
