// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/bpf"
	"github.com/culvert-mesh/culvert/internal/netns"
)

// Slot names a listener of a pod, enum slot of bpf/steer.c.
type Slot uint32

// The slots.
const (
	Outbound4 Slot = iota
	Outbound6
	HBONE4
	HBONE6
)

// PodConfig describes a pod.
type PodConfig struct {
	Name      string // unique on the node
	NS        *netns.NS
	NetnsPath string       // by which NS is found again for its release
	Addrs     []netip.Addr // primary addresses, one of a family at most
}

// Pod is the redirection of one network namespace.
type Pod struct {
	n         *Node
	cfg       PodConfig
	v4, v6    netip.Addr
	dir       string // pins
	state     podState
	link      link.Link
}

// AddPod sets the namespace up and attaches its steering: from then on nothing
// from outside reaches the pod's primary addresses but the tunnel's own
// listener. Outgoing connections are captured after Enrol.
func (n *Node) AddPod(_ context.Context, cfg PodConfig) (_ *Pod, err error) {
	p := &Pod{n: n, cfg: cfg, dir: filepath.Join(n.pins, podsDir, podFile(cfg.Name))}
	for _, a := range cfg.Addrs {
		a = a.Unmap()
		at := &p.v4
		if a.Is6() {
			at = &p.v6
		}
		if at.IsValid() {
			return nil, fmt.Errorf("redirect pod %s: two addresses of one family, %s and %s: name the primary one", cfg.Name, *at, a)
		}
		*at = a
	}
	if !p.v4.IsValid() && !p.v6.IsValid() {
		return nil, fmt.Errorf("redirect pod %s: it has no address", cfg.Name)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("redirect pod %s: %w", cfg.Name, errors.Join(err, p.Release()))
		}
	}()
	if err := p.adopt(); err != nil {
		return nil, err
	}
	if err := cfg.NS.Do(p.setUp); err != nil {
		return nil, err
	}
	if err := p.attach(); err != nil {
		return nil, err
	}
	return p, nil
}

// adopt reads what an earlier process has noted of the pod, so that its
// sysctls are restored to what they were before either. What belongs to a
// predecessor under the same name is removed.
func (p *Pod) adopt() error {
	old, err := readState(p.n.cfg.RunDir, p.cfg.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case old.Cookie == p.cfg.NS.Cookie():
		p.state = old
		return nil
	default:
		if err := p.n.maps.Enrolled.Delete(old.Cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove predecessor: %w", err)
		}
		if err := os.RemoveAll(p.dir); err != nil {
			return fmt.Errorf("remove predecessor's pins: %w", err)
		}
	}
	p.state = podState{Name: p.cfg.Name, NetnsPath: p.cfg.NetnsPath, Cookie: p.cfg.NS.Cookie()}
	return nil
}

// setUp sets sysctls, routes and rules, on a thread in the namespace.
func (p *Pod) setUp() error {
	if len(p.state.Sysctls) == 0 {
		saved, err := readSysctls(p.v6.IsValid())
		if err != nil {
			return err
		}
		p.state.Sysctls = saved
		p.state.V4, p.state.V6 = p.v4, p.v6
	}
	// Written down before anything is changed: a release finds it.
	if err := p.state.write(p.n.cfg.RunDir); err != nil {
		return err
	}
	if err := setSysctls(p.v6.IsValid()); err != nil {
		return err
	}
	for _, a := range []netip.Addr{p.v4, p.v6} {
		if a.IsValid() {
			if err := addRouting(a); err != nil {
				return err
			}
		}
	}
	return nil
}

// attach loads the pod's own instance of the steering program and attaches it,
// in place of the one that is pinned where there is one.
func (p *Pod) attach() error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	spec, err := bpf.LoadSteer()
	if err != nil {
		return fmt.Errorf("read BPF programs: %w", err)
	}
	if err := p.setConstants(spec); err != nil {
		return err
	}
	replace := map[string]*ebpf.Map{
		"decisions":    p.n.maps.Decisions,
		"destinations": p.n.maps.Destinations,
		"listeners":    p.n.maps.Listeners,
		"mesh_cidrs":   p.n.maps.MeshCidrs,
	}
	var objects bpf.SteerObjects
	if err := spec.LoadAndAssign(&objects, &ebpf.CollectionOptions{MapReplacements: replace}); err != nil {
		return fmt.Errorf("load steering program: %w", err)
	}
	defer objects.Close() // the link holds the program, the node the maps
	return p.attachLink(objects.Steer)
}

// addresses is struct pod of bpf/culvert.h.
func (p *Pod) addresses() bpf.ConnectPod {
	var out bpf.ConnectPod
	if p.v4.IsValid() {
		out.V4 = address(p.v4)
	}
	if p.v6.IsValid() {
		out.V6 = address(p.v6)
	}
	return out
}

// address is struct address: network order, IPv4 as ::ffff:a.b.c.d.
func address(a netip.Addr) bpf.ConnectAddress {
	b := a.As16()
	var out bpf.ConnectAddress
	for i := range out.W {
		out.W[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return out
}

func (p *Pod) setConstants(spec *ebpf.CollectionSpec) error {
	if err := spec.Variables["self"].Set(p.addresses()); err != nil {
		return fmt.Errorf("set pod's addresses: %w", err)
	}
	if err := spec.Variables["cookie"].Set(p.cfg.NS.Cookie()); err != nil {
		return fmt.Errorf("set namespace cookie: %w", err)
	}
	for name, a := range map[string]netip.Addr{"device4": p.v4, "device6": p.v6} {
		if !a.IsValid() {
			continue
		}
		index, err := p.device(a)
		if err != nil {
			return err
		}
		if err := spec.Variables[name].Set(uint32(index)); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// device finds the interface that holds an address of the pod.
func (p *Pod) device(a netip.Addr) (index int, err error) {
	err = p.cfg.NS.Do(func() error {
		all, err := netlink.AddrList(nil, family(a))
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for _, have := range all {
			if ip, ok := netip.AddrFromSlice(have.IP); ok && ip.Unmap() == a {
				index = have.LinkIndex
				return nil
			}
		}
		return fmt.Errorf("no interface in the namespace has the address %s: is it the right namespace, and is the address set by now?", a)
	})
	return index, err
}

func (p *Pod) attachLink(prog *ebpf.Program) error {
	pin := filepath.Join(p.dir, "steer")
	if l, err := link.LoadPinnedLink(pin, nil); err == nil {
		if err := l.Update(prog); err == nil {
			p.link = l
			return nil
		}
		l.Close() // its namespace is gone
		if err := os.Remove(pin); err != nil {
			return err
		}
	}
	l, err := link.AttachNetNs(p.cfg.NS.FD(), prog)
	if err != nil {
		return fmt.Errorf("attach steering program: %w", err)
	}
	p.link = l
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin steering program: %w", err)
	}
	return nil
}

// listener is struct listener of bpf/culvert.h.
func (p *Pod) listener(s Slot) bpf.ConnectListener {
	return bpf.ConnectListener{Cookie: p.cfg.NS.Cookie(), Slot: uint32(s)}
}

// Listen makes fd the listener of a slot. The descriptor stays the caller's;
// when the last one is closed, the slot is empty and connections are refused.
func (p *Pod) Listen(s Slot, fd int) error {
	if err := p.n.maps.Listeners.Put(p.listener(s), uint64(fd)); err != nil {
		return fmt.Errorf("steer pod %s: put listener: %w", p.cfg.Name, err)
	}
	return nil
}

// Enrol captures the pod's outgoing connections from now on.
func (p *Pod) Enrol() error {
	if err := p.n.maps.Enrolled.Put(p.cfg.NS.Cookie(), p.addresses()); err != nil {
		if errors.Is(err, unix.E2BIG) {
			return fmt.Errorf("enrol pod %s: %d pods are enrolled, more are not possible on a node", p.cfg.Name, p.n.maps.Enrolled.MaxEntries())
		}
		return fmt.Errorf("enrol pod %s: %w", p.cfg.Name, err)
	}
	return nil
}

// Close closes the process's handles; what is pinned stays.
func (p *Pod) Close() error {
	var errs []error
	if p.link != nil {
		errs = append(errs, p.link.Close())
		p.link = nil
	}
	return errors.Join(errs...)
}

// Release takes away what AddPod and Enrol have set, goes on past errors, and
// may be called more than once. The pod's traffic is then what it was before.
func (p *Pod) Release() error {
	errs := []error{}
	if err := p.n.maps.Enrolled.Delete(p.cfg.NS.Cookie()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		errs = append(errs, fmt.Errorf("release pod %s: %w", p.cfg.Name, err))
	}
	for s := Outbound4; s <= HBONE6; s++ {
		if err := p.n.maps.Listeners.Delete(p.listener(s)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("release pod %s: remove listener: %w", p.cfg.Name, err))
		}
	}
	errs = append(errs, p.Close())
	if err := os.RemoveAll(p.dir); err != nil {
		errs = append(errs, fmt.Errorf("remove pins of pod %s: %w", p.cfg.Name, err))
	}
	if len(p.state.Sysctls) > 0 {
		if _, err := p.state.undo(p.cfg.NS); err != nil {
			errs = append(errs, fmt.Errorf("release pod %s: %w", p.cfg.Name, err))
		}
	}
	errs = append(errs, p.state.remove(p.n.cfg.RunDir))
	return errors.Join(errs...)
}

// podFile is a pod's name as a file's.
func podFile(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:8])
}
