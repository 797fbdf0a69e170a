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
const layout = "v1"

// Config says where things are. Logger is required.
type Config struct {
	RunDir string // lock, and what release needs; "": /run/culvert
	BPFFS  string // "": /sys/fs/bpf, mounted there when it is not
	Cgroup string // cgroup v2 directory that holds the pods' processes; "": the v2 root
	Logger *slog.Logger
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
	cfg   Config
	lock  *os.File
	pins  string // directory
	maps  bpf.ConnectMaps
	links []link.Link

	decisions []string // names, in the order of the map

	mu           sync.Mutex // guards what was written to the maps
	destinations map[netip.Addr]Destination
}

// Open loads the programs and attaches them to the cgroup, or takes over what a
// previous process has pinned. It refuses to run beside another one of the same
// run directory.
func Open(cfg Config) (_ *Node, err error) {
	if cfg.RunDir == "" {
		cfg.RunDir = "/run/culvert"
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("redirect connections: loading BPF programs needs root (CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN)")
	}
	n := &Node{cfg: cfg, destinations: map[netip.Addr]Destination{}}
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
	if n.pins, err = pinDir(cfg, true); err != nil {
		return nil, err
	}
	cgroup := cfg.Cgroup
	if cgroup == "" {
		if cgroup, err = cgroupRoot(); err != nil {
			return nil, err
		}
	}
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
	for _, h := range []struct {
		name   string
		attach ebpf.AttachType
		prog   *ebpf.Program
	}{
		{"connect4", ebpf.AttachCGroupInet4Connect, objects.Capture4},
		{"connect6", ebpf.AttachCGroupInet6Connect, objects.Capture6},
	} {
		l, err := attachCgroup(filepath.Join(n.pins, h.name), cgroup, h.attach, h.prog)
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", h.name, cgroup, err)
		}
		n.links = append(n.links, l)
	}
	n.cfg.Logger.Info("connections are steered", "cgroup", cgroup, "pins", n.pins)
	return nil
}

// attachCgroup attaches a program, in place of the one that a pinned link
// holds where there is one, so that there is no time without either.
func attachCgroup(pin, cgroup string, attach ebpf.AttachType, prog *ebpf.Program) (link.Link, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		if err := l.Update(prog); err == nil {
			return l, nil
		}
		// The cgroup it was attached to is gone.
		l.Close()
		if err := os.Remove(pin); err != nil {
			return nil, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err = link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: attach, Program: prog})
	if err != nil {
		return nil, err
	}
	if err := l.Pin(pin); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Close closes the process's handles. What is pinned stays, and goes on
// refusing.
func (n *Node) Close() error {
	var errs []error
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
	if len(n.destinations) == 0 { // perhaps taken over: read what is there
		var key [16]byte
		var value uint32
		for it := n.maps.Destinations.Iterate(); it.Next(&key, &value); {
			n.destinations[netip.AddrFrom16(key).Unmap()] = Destination(value)
		}
	}
	for a, d := range want {
		a = a.Unmap()
		if n.destinations[a] == d {
			continue
		}
		if err := n.maps.Destinations.Put(a.As16(), uint32(d)); err != nil {
			if errors.Is(err, unix.E2BIG) {
				return fmt.Errorf("set destination %s: the map is full with %d addresses", a, n.maps.Destinations.MaxEntries())
			}
			return fmt.Errorf("set destination %s: %w", a, err)
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

// SetMeshCIDRs sets the ranges inside which an unknown address is refused.
func (n *Node) SetMeshCIDRs(ranges []netip.Prefix) error {
	if err := setRanges(n.maps.MeshCidrs, ranges); err != nil {
		return fmt.Errorf("set mesh ranges: %w", err)
	}
	return nil
}

// SetBypass sets the ranges that are left alone.
func (n *Node) SetBypass(ranges []netip.Prefix) error {
	if err := setRanges(n.maps.Bypass, ranges); err != nil {
		return fmt.Errorf("set bypassed ranges: %w", err)
	}
	return nil
}

// rangeKey is struct range of bpf/culvert.h.
type rangeKey struct {
	Bits uint32
	Addr [16]byte
}

func setRanges(m *ebpf.Map, ranges []netip.Prefix) error {
	want := make(map[rangeKey]bool, len(ranges))
	for _, r := range ranges {
		k := rangeKey{Bits: uint32(r.Bits()), Addr: r.Masked().Addr().As16()}
		if r.Addr().Is4() {
			k.Bits += 96
		}
		want[k] = true
		if err := m.Put(k, uint32(1)); err != nil {
			return fmt.Errorf("add %s: %w", r, err)
		}
	}
	var have []rangeKey
	var k rangeKey
	var v uint32
	for it := m.Iterate(); it.Next(&k, &v); {
		have = append(have, k)
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
// run directory of its own.
func instance(runDir string) string {
	abs, err := filepath.Abs(runDir)
	if err != nil {
		abs = runDir
	}
	sum := sha256.Sum256([]byte(abs))
	return hex.EncodeToString(sum[:6])
}
