// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/socket"
	"github.com/culvert-mesh/culvert/tunnel"
)

// enroller enrols pods: it joins what redirect, socket, identity and tunnel
// each do for one.
type enroller struct {
	node     *redirect.Node
	sockets  *socket.Maker
	tunnel   *tunnel.Tunnel
	identity identity.Source
	log      *slog.Logger
}

// enrol enrols p. The order matters: its certificate and listeners are there
// before its first connection is captured. release stops serving the pod; what
// is pinned stays.
func (e enroller) enrol(ctx context.Context, p pod.Pod) (release func() error, err error) {
	var undo closers
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.close())
		}
	}()
	ns, err := netns.Open(p.NetnsPath)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	undo.add(ns.Close)
	if _, err := e.identity.SVID(ctx, p.Identity()); err != nil {
		return nil, fmt.Errorf("get certificate for %s: %w", p.Identity(), err)
	}
	steered, err := e.node.AddPod(ctx, redirect.PodConfig{Name: p.Key(), NS: ns, NetnsPath: p.NetnsPath, Addrs: p.Addresses})
	if err != nil {
		return nil, err
	}
	stock := e.sockets.Stock(ns)
	undo.add(stock.Close)
	served := e.tunnel.AddPod(tunnel.PodConfig{
		Key:       p.Key(),
		Name:      p.Name,
		Namespace: p.Namespace,
		Identity:  p.Identity(),
		Sockets:   podSockets{maker: e.sockets, stock: stock, ns: ns, addrs: steered.Addrs()},
	})
	undo.add(func() error { served.Remove(); return nil })
	if err := e.listen(ns, steered, served, steered.Addrs()); err != nil {
		return nil, err
	}
	if err := steered.Enrol(); err != nil {
		return nil, err
	}
	e.log.Info("pod enrolled", "pod", p.Key(), "identity", p.Identity().String(), "addresses", steered.Addrs())
	return undo.close, nil
}

// listen opens the pod's listeners for each family that it has an address of.
func (e enroller) listen(ns *netns.NS, steered *redirect.Pod, served *tunnel.Pod, addrs []netip.Addr) error {
	for _, v6 := range []bool{false, true} {
		any, outbound, hbone := netip.IPv4Unspecified(), redirect.Outbound4, redirect.HBONE4
		if v6 {
			any, outbound, hbone = netip.IPv6Unspecified(), redirect.Outbound6, redirect.HBONE6
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
func (s podSockets) Deliver(fd int, client netip.Addr, dst netip.AddrPort) error {
	return socket.Deliver(fd, client, dst)
}
