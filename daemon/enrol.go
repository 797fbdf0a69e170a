// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/socket"
	"github.com/culvert-mesh/culvert/tunnel"
)

// enroller is the pod.Enroller of a node: it joins what redirect, socket,
// identity and tunnel each do for one pod.
type enroller struct {
	node     *redirect.Node
	sockets  *socket.Maker
	tunnel   *tunnel.Tunnel
	identity identity.Source
	modes    *modes
	existing *existing
	told     *decisionLog
	log      *slog.Logger

	// What is swept must not be taken over meanwhile: an enrolment reads, a
	// sweep writes.
	sweeping sync.RWMutex
}

// enrolment is an enrolled pod.
type enrolment struct {
	e       *enroller
	pod     pod.Pod
	ns      *netns.NS
	stock   *socket.Stock
	served  *tunnel.Pod
	steered *redirect.Pod
	mode    *podMode
	beside  *existingPod

	plaintext int // connections beside the tunnel that were still there at the end
}

// Enrol is pod.Enroller's. The order matters: the pod's certificate and listeners
// are there, and a probe has arrived, before its first connection is carried. From
// its capture until then it is refused.
func (e *enroller) Enrol(ctx context.Context, p pod.Pod) (_ pod.Enrolment, err error) {
	e.sweeping.RLock()
	defer e.sweeping.RUnlock()
	out := &enrolment{e: e, pod: p}
	captured := false
	defer func() {
		if err == nil {
			return
		}
		out.unserve()
		if out.beside != nil {
			e.existing.remove(out.beside)
		}
		switch {
		case captured: // it is ours, and does not work: refused until it does
			err = errors.Join(err, out.steered.Leave())
		case out.steered != nil:
			err = errors.Join(err, out.steered.Abandon())
		}
		if out.ns != nil {
			err = errors.Join(err, out.ns.Close())
		}
	}()
	if out.ns, err = netns.Open(p.NetnsPath); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: correct the pod's netns, or take the pod off the list", err)
		}
		return nil, err
	}
	if _, err := e.identity.SVID(ctx, p.Identity()); err != nil {
		return nil, fmt.Errorf("get certificate for %s: %w", p.Identity(), err)
	}
	if out.steered, err = e.node.AddPod(ctx, redirect.PodConfig{Name: p.Key(), NS: out.ns, NetnsPath: p.NetnsPath, Addrs: p.Addresses}); err != nil {
		return nil, err
	}
	if out.mode, err = e.modes.add(p.Namespace, p.Name, out.steered.SetPlainPorts); err != nil {
		return nil, err
	}
	addrs := out.steered.Addrs()
	out.stock = e.sockets.Stock(out.ns)
	out.served = e.tunnel.AddPod(tunnel.PodConfig{
		Key:       p.Key(),
		Name:      p.Name,
		Namespace: p.Namespace,
		Identity:  p.Identity(),
		Sockets:   podSockets{maker: e.sockets, stock: out.stock, ns: out.ns, addrs: addrs},
	})
	e.told.add(p)
	if err := out.steered.Enrol(); err != nil {
		return nil, err
	}
	captured = true
	if err := e.listen(out.ns, out.steered, out.served, addrs); err != nil {
		return nil, err
	}
	out.beside = e.existing.add(p.Key(), out.steered, out.served) // the hooks are on: there come no more
	if err := out.steered.Probe(ctx); err != nil {
		return nil, err
	}
	if err := out.steered.Carry(); err != nil {
		return nil, err
	}
	e.log.Info("pod enrolled", "pod", p.Key(), "identity", p.Identity().String(), "addresses", addrs)
	return out, nil
}

// Sweep is pod.Enroller's.
func (e *enroller) Sweep(listed func() []pod.Pod) error {
	e.sweeping.Lock()
	defer e.sweeping.Unlock()
	names, paths := map[string]bool{}, map[string]bool{}
	for _, p := range listed() {
		names[p.Key()], paths[p.NetnsPath] = true, true
	}
	// One that is listed and could not be enrolled yet stays refused.
	released, err := e.node.ReleaseOthers(func(name, path string) bool { return names[name] || paths[path] })
	for _, what := range released {
		e.log.Info("released a pod that is not listed any more", "what", what)
	}
	return err
}

// unserve ends the pod's listeners, tunnels and connections.
func (n *enrolment) unserve() {
	n.e.told.remove(n.pod)
	n.e.modes.remove(n.mode)
	if n.served != nil {
		n.served.Remove()
		n.served = nil
	}
	if n.stock != nil {
		if err := n.stock.Close(); err != nil {
			n.e.log.Error("close a pod's delivery sockets", "pod", n.pod.Key(), "err", err)
		}
		n.stock = nil
	}
}

// End is pod.Enrolment's. Tunnels go first, while the namespace is refused.
func (n *enrolment) End(how pod.End) error {
	n.unserve()
	if n.ns == nil {
		return nil
	}
	if n.beside != nil {
		n.plaintext = n.e.existing.remove(n.beside)
		n.beside = nil
	}
	// A namespace that nobody finds by the path any more has no successor in it.
	if how == pod.Refuse && !n.Moved() {
		if err := n.steered.Leave(); err != nil {
			return err
		}
	} else {
		if err := n.steered.Release(); err != nil {
			return err
		}
		n.e.log.Info("pod released: it connects as without Culvert, in plaintext; what was carried is reset", "pod", n.pod.Key(), "addresses", n.steered.Addrs(),
			"older_than_enrolment", n.plaintext)
	}
	err := n.ns.Close()
	n.ns = nil
	return err
}

// Moved is pod.Enrolment's. A path that leads nowhere, or not to a namespace yet,
// is no move: who is in the namespace still may be there, and is listed. While
// the handle is open the inode is nobody else's.
func (n *enrolment) Moved() bool {
	var fs unix.Statfs_t
	if unix.Statfs(n.pod.NetnsPath, &fs) != nil || fs.Type != unix.NSFS_MAGIC {
		return false
	}
	var now, ours unix.Stat_t
	if unix.Stat(n.pod.NetnsPath, &now) != nil || unix.Fstat(n.ns.FD(), &ours) != nil {
		return false
	}
	return now.Dev != ours.Dev || now.Ino != ours.Ino
}

// listen opens the pod's listeners for each family that it has an address of.
func (e *enroller) listen(ns *netns.NS, steered *redirect.Pod, served *tunnel.Pod, addrs []netip.Addr) error {
	for _, v6 := range []bool{false, true} {
		any, outbound, inbound, hbone := netip.IPv4Unspecified(), redirect.Outbound4, redirect.Inbound4, redirect.HBONE4
		if v6 {
			any, outbound, inbound, hbone = netip.IPv6Unspecified(), redirect.Outbound6, redirect.Inbound6, redirect.HBONE6
		}
		if !has(addrs, v6) {
			continue
		}
		for _, l := range []struct {
			slot  redirect.Slot
			port  uint16
			serve func(int) error
		}{
			{outbound, tunnel.OutboundPort, served.ServeOutbound},
			{inbound, tunnel.InboundPort, served.ServePlain},
			{hbone, tunnel.HBONEPort, served.ServeHBONE},
		} {
			fd, err := e.sockets.Listen(ns, netip.AddrPortFrom(any, l.port), true)
			if err != nil {
				return err
			}
			if err := steered.Listen(l.slot, fd); err != nil {
				unix.Close(fd)
				return err
			}
			if err := l.serve(fd); err != nil {
				unix.Close(fd)
				return err
			}
		}
	}
	return nil
}

func has(addrs []netip.Addr, v6 bool) bool {
	for _, a := range addrs {
		if a.Is6() == v6 {
			return true
		}
	}
	return false
}

// podSockets is one pod's tunnel.Sockets.
type podSockets struct {
	maker *socket.Maker
	stock *socket.Stock
	ns    *netns.NS
	addrs []netip.Addr
}

// Dial is tunnel.Sockets'.
func (s podSockets) Dial(dst netip.Addr) (int, error) {
	for _, a := range s.addrs {
		if a.Is6() == dst.Is6() {
			return s.maker.Dial(s.ns, a)
		}
	}
	return -1, fmt.Errorf("the pod has no address of the family of %s: %w", dst, unix.EHOSTUNREACH)
}

// Take is tunnel.Sockets'.
func (s podSockets) Take(v6 bool) (int, bool) { return s.stock.Take(v6) }

// Wait is tunnel.Sockets'.
func (s podSockets) Wait(v6 bool, got func(int, error)) { s.stock.Wait(v6, got) }

// Deliver is tunnel.Sockets'.
func (s podSockets) Deliver(fd int, client netip.Addr, dst netip.AddrPort, avoid func(uint16) bool) error {
	return socket.Deliver(fd, client, dst, avoid)
}

// MarkedListener is tunnel.Sockets'.
func (s podSockets) MarkedListener(dst netip.AddrPort) (tunnel.Listener, bool, error) {
	l, found, err := socket.MarkedListener(s.ns, dst)
	return tunnel.Listener{Addr: l.Local, Mark: l.Mark, Cookie: l.Cookie}, found, err
}
