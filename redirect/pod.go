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
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/bpf"
	"github.com/culvert-mesh/culvert/internal/netns"
)

// Slot names a listener of a pod, enum slot of bpf/culvert.h.
type Slot uint32

// The slots.
const (
	Outbound4 Slot = iota
	Outbound6
	HBONE4
	HBONE6
	Inbound4 // plaintext, of a pod that takes it: SetPlainPorts
	Inbound6
)

// steerPin is the name of the pin of a pod's steering.
const steerPin = "steer"

// PodConfig describes a pod.
type PodConfig struct {
	Name      string // unique on the node
	NS        *netns.NS
	NetnsPath string       // by which NS is found again for its release
	Addrs     []netip.Addr // primary addresses, one of a family at most
}

// Pod is the redirection of one network namespace.
type Pod struct {
	n      *Node
	cfg    PodConfig
	v4, v6 netip.Addr
	dir    string // pins
	state  podState
	link   link.Link
	healer *healer
	// devices hold the addresses, as the steering knows it.
	devices map[netip.Addr]int

	adopted bool       // an earlier process, or pod, has set it up
	before  []podState // what it was known as then, where that was another name
}

// AddPod sets the namespace up and attaches its steering: from then on nothing
// from outside reaches the pod's primary addresses but the tunnel's own
// listener. Outgoing connections are captured after Enrol. It waits, as long as
// ctx and setUpWait allow, for an address that is not usable yet. A pod that an
// earlier process has left is taken over; when that fails it stays refused. One
// that another instance on the machine has is refused, and left as it is.
func (n *Node) AddPod(ctx context.Context, cfg PodConfig) (_ *Pod, err error) {
	p := &Pod{n: n, cfg: cfg, dir: n.podPins(cfg.Name), devices: map[netip.Addr]int{}}
	defer func() {
		if err != nil {
			err = fmt.Errorf("redirect pod %s: %w", cfg.Name, err)
		}
	}()
	if err := p.takeAddrs(); err != nil {
		return nil, err
	}
	if err := n.claim(p); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Abandon())
		}
	}()
	if err := p.adopt(); err != nil {
		return nil, err
	}
	if err := p.await(ctx); err != nil {
		return nil, err
	}
	err = p.alone(ctx, func() error {
		if err := cfg.NS.Do(p.setUp); err != nil {
			return err
		}
		return p.attach()
	})
	if err != nil {
		return nil, err
	}
	if err := p.startHealer(); err != nil {
		return nil, err
	}
	return p, nil
}

// takeAddrs sorts the configured addresses by family.
func (p *Pod) takeAddrs() error {
	for _, a := range p.cfg.Addrs {
		a = a.Unmap()
		if !a.IsGlobalUnicast() || a.Zone() != "" {
			return fmt.Errorf("%s is no address that others reach it by", a)
		}
		at := &p.v4
		if a.Is6() {
			at = &p.v6
		}
		if at.IsValid() {
			return fmt.Errorf("two addresses of one family, %s and %s: name the primary one", *at, a)
		}
		*at = a
	}
	if !p.v4.IsValid() && !p.v6.IsValid() {
		return errors.New("it has no address")
	}
	return nil
}

// Fit says which addresses of a pod would be steered, were it added now: its error
// is what its namespace lacks. Nothing is changed.
func Fit(ns *netns.NS, addrs []netip.Addr) ([]netip.Addr, error) {
	p := &Pod{n: &Node{cfg: Config{Logger: slog.New(slog.DiscardHandler)}}, cfg: PodConfig{NS: ns, Addrs: addrs}}
	if err := p.takeAddrs(); err != nil {
		return nil, err
	}
	var lacking error
	err := ns.Do(func() (err error) { lacking, err = p.lacking(); return err })
	return p.Addrs(), errors.Join(err, lacking)
}

// Addrs returns the addresses that are steered: the configured ones, but for
// those of IPv6 in a namespace that has it disabled.
func (p *Pod) Addrs() []netip.Addr {
	return slices.DeleteFunc([]netip.Addr{p.v4, p.v6}, func(a netip.Addr) bool { return !a.IsValid() })
}

func (n *Node) podPins(name string) string { return filepath.Join(n.pins, podsDir, podFile(name)) }

// adopt reads what an earlier process has noted of the pod, so that its sysctls
// are restored to what they were before either. A predecessor in the same
// namespace under another name is taken over too: released first, the namespace
// would be in plaintext for a moment. One under the same name elsewhere is
// released.
func (p *Pod) adopt() error {
	all, err := readStates(p.n.cfg.RunDir)
	if err != nil {
		return err
	}
	ino, err := inode(p.cfg.NS)
	if err != nil {
		return err
	}
	p.state = podState{Name: p.cfg.Name, NetnsPath: p.cfg.NetnsPath, Cookie: p.cfg.NS.Cookie(), Inode: ino}
	for _, old := range all {
		switch {
		case old.Cookie == p.state.Cookie:
			p.state.Sysctls, p.state.V4, p.state.V6 = old.Sysctls, old.V4, old.V6
			p.adopted = true
			if old.Name != p.state.Name {
				p.before = append(p.before, old)
			}
		case old.Name == p.state.Name:
			p.n.cfg.Logger.Info("release a pod's predecessor", "pod", p.cfg.Name, "predecessor", old.Name, "netns", old.NetnsPath)
			if _, err := p.n.release(old, nil); err != nil {
				return fmt.Errorf("release predecessor %s: %w", old.Name, err)
			}
		}
	}
	return nil
}

// rename makes the pins of predecessors in the same namespace the pod's own, and
// forgets their names. The pod's own state is written by then.
func (p *Pod) rename() error {
	for _, old := range p.before {
		from := p.n.podPins(old.Name)
		err := os.Rename(from, p.dir)
		if errors.Is(err, fs.ErrExist) { // it has pins of its own already
			err = detach(filepath.Join(from, steerPin))
			if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			err = errors.Join(err, os.RemoveAll(from))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("take over the pins of pod %s: %w", old.Name, err)
		}
		if err := old.remove(p.n.cfg.RunDir); err != nil {
			return err
		}
	}
	p.before = nil
	return nil
}

const (
	// setUpWait bounds the wait for addresses: duplicate address detection
	// takes 1-2 s (RFC 4862, one probe).
	setUpWait = 5 * time.Second
	setUpPoll = 20 * time.Millisecond
)

// await waits until lo is up and the pod's addresses can be used.
func (p *Pod) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, setUpWait)
	defer cancel()
	tick := time.NewTicker(setUpPoll)
	defer tick.Stop()
	for {
		var lacking error
		if err := p.cfg.NS.Do(func() (err error) { lacking, err = p.lacking(); return err }); err != nil {
			return err
		}
		if lacking == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return lacking
		case <-tick.C:
		}
	}
}

// lacking says what the namespace lacks yet, on a thread in it.
func (p *Pod) lacking() (lacking, err error) {
	lo, err := netlink.LinkByIndex(loopback)
	if err != nil {
		return nil, fmt.Errorf("look at lo: %w", err)
	}
	if lo.Attrs().Flags&net.FlagUp == 0 {
		return errors.New("lo is down in its namespace: bring it up with `ip link set lo up`, carried connections go over it"), nil
	}
	if p.v6.IsValid() && !hasIPv6() {
		if !p.v4.IsValid() {
			return nil, fmt.Errorf("its only address is %s, and IPv6 is disabled in its namespace", p.v6)
		}
		p.n.cfg.Logger.Warn("IPv6 is disabled in the pod's namespace: only its IPv4 address is steered", "pod", p.cfg.Name, "address", p.v6)
		p.v6 = netip.Addr{}
	}
	for _, a := range p.Addrs() {
		found, err := findAddr(a)
		switch {
		case err != nil:
			return nil, err
		case found == nil:
			return fmt.Errorf("no interface in the namespace has the address %s: is it the right namespace, and is the address set by now?", a), nil
		case found.Flags&unix.IFA_F_DADFAILED != 0:
			return nil, fmt.Errorf("the address %s is in use elsewhere too (duplicate address detection)", a)
		case found.Flags&unix.IFA_F_TENTATIVE != 0 && found.Flags&unix.IFA_F_OPTIMISTIC == 0:
			return fmt.Errorf("the address %s is still tentative (duplicate address detection)", a), nil
		}
	}
	return nil, nil
}

// setUp sets sysctls, routes and rules, on a thread in the namespace.
func (p *Pod) setUp() error {
	saved, err := readSysctls(p.v6.IsValid())
	if err != nil {
		return err
	}
	if p.state.Sysctls == nil {
		p.state.Sysctls = map[string]string{}
	}
	for key, value := range saved {
		if _, ok := p.state.Sysctls[key]; !ok { // else noted before we set it
			p.state.Sysctls[key] = value
		}
	}
	before := []netip.Addr{p.state.V4, p.state.V6}
	p.state.V4, p.state.V6 = p.v4, p.v6
	// Written down before anything is changed: a release finds it.
	if err := p.state.write(p.n.cfg.RunDir); err != nil {
		return err
	}
	if err := p.rename(); err != nil {
		return err
	}
	if err := setSysctls(p.v6.IsValid()); err != nil {
		return err
	}
	for i, a := range []netip.Addr{p.v4, p.v6} {
		switch {
		case a.IsValid():
			err = addRouting(a)
		case before[i].IsValid():
			_, err = removeRouting(before[i])
		}
		if err != nil {
			return err
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
	return p.loadSteer(p.attachLink)
}

// loadSteer loads the program with the pod's constants for f, which has a link
// hold it.
func (p *Pod) loadSteer(f func(*ebpf.Program) error) error {
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
		"events":       p.n.maps.Events,
		"listeners":    p.n.maps.Listeners,
		"mesh_cidrs":   p.n.maps.MeshCidrs,
		"plain_ports":  p.n.maps.PlainPorts,
	}
	var objects bpf.SteerObjects
	if err := spec.LoadAndAssign(&objects, &ebpf.CollectionOptions{MapReplacements: replace}); err != nil {
		return fmt.Errorf("load steering program: %w", err)
	}
	defer objects.Close() // the link holds the program, the node the maps
	return f(objects.Steer)
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
		p.devices[a] = index
	}
	return nil
}

// device finds the interface that holds an address of the pod.
func (p *Pod) device(a netip.Addr) (index int, err error) {
	err = p.cfg.NS.Do(func() error {
		found, err := findAddr(a)
		if err == nil && found == nil {
			err = fmt.Errorf("the address %s has gone", a)
		}
		if err == nil {
			index = found.LinkIndex
		}
		return err
	})
	return index, err
}

func (p *Pod) attachLink(prog *ebpf.Program) error {
	pin := filepath.Join(p.dir, steerPin)
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
func listener(cookie uint64, s Slot) bpf.ConnectListener {
	return bpf.ConnectListener{Cookie: cookie, Slot: uint32(s)}
}

// Listen makes fd the listener of a slot. The descriptor stays the caller's;
// when the last one is closed, the slot is empty and connections are refused.
func (p *Pod) Listen(s Slot, fd int) error {
	if err := p.n.maps.Listeners.Put(listener(p.cfg.NS.Cookie(), s), uint64(fd)); err != nil {
		return fmt.Errorf("steer pod %s: put listener: %w", p.cfg.Name, err)
	}
	return nil
}

// Enrol captures the pod's outgoing connections from now on: what they have with the
// mesh is refused until Carry. It fails while processes of the namespace live outside
// the cgroup that the hooks are attached to: they would send plaintext, and nothing
// would say so.
func (p *Pod) Enrol() error {
	out, err := Outsiders(p.n.cgroup, p.cfg.NS)
	if err != nil {
		return fmt.Errorf("enrol pod %s: look for its processes: %w", p.cfg.Name, err)
	}
	if len(out) > 0 {
		return fmt.Errorf("enrol pod %s: processes of its namespace live outside the cgroup %s, where connections are captured: %s: configure a cgroup that holds them", p.cfg.Name, p.n.cgroup, strings.Join(out, ", "))
	}
	return p.enrolled(false)
}

// Carry has the pod's connections carried, once Probe has seen that they would be.
func (p *Pod) Carry() error { return p.enrolled(true) }

// enrolled writes the pod's entry for the hooks.
func (p *Pod) enrolled(carried bool) error {
	as := p.addresses()
	if carried {
		as.Carried = 1
	}
	if err := p.n.maps.Enrolled.Put(p.cfg.NS.Cookie(), as); err != nil {
		return fmt.Errorf("enrol pod %s: %w", p.cfg.Name, full(err, p.n.maps.Enrolled, "pods on a node"))
	}
	return nil
}

// close closes the process's handles; what is pinned stays.
func (p *Pod) close() error {
	var errs []error
	if p.healer != nil {
		errs = append(errs, p.healer.close())
		p.healer = nil
	}
	if p.link != nil {
		errs = append(errs, p.link.Close())
		p.link = nil
	}
	return errors.Join(errs...)
}

// podFile is a pod's name as a file's.
func podFile(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:8])
}
