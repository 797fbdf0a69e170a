// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const netnsDir = "/run/netns"

// sysctl writes a key below /proc/sys/net; the file belongs to the namespace of the thread that opens it.
func sysctl(key, value string) error {
	path := filepath.Join("/proc/sys/net", strings.ReplaceAll(key, ".", "/"))
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("set %s: %w", key, err)
	}
	return nil
}

func setUp(keys ...string) error {
	keys = append(keys,
		"ipv6.conf.all.disable_ipv6=0", "ipv6.conf.default.disable_ipv6=0",
		// No waiting for duplicate address detection, no router solicitations in the captures.
		"ipv6.conf.all.accept_dad=0", "ipv6.conf.default.accept_dad=0",
		"ipv6.conf.all.accept_ra=0", "ipv6.conf.default.accept_ra=0",
		"ipv6.conf.all.router_solicitations=0", "ipv6.conf.default.router_solicitations=0",
	)
	for _, k := range keys {
		key, value, _ := strings.Cut(k, "=")
		if err := sysctl(key, value); err != nil {
			return err
		}
	}
	return linkUp("lo")
}

func setUpNode() error {
	return setUp("ipv4.ip_forward=1", "ipv6.conf.all.forwarding=1", "ipv6.conf.default.forwarding=1")
}

func linkUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// mac makes a locally administered address; kind keeps pods, gateways and uplinks apart.
func mac(kind byte, a, b int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x77, kind, byte(a), byte(b), 0x01}
}

const (
	macPod byte = iota + 1
	macGateway
	macUplink
)

// gateways are the addresses of the node's end of each of its pods' veths.
func (n *Node) gateways() []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{10, 77, byte(n.Number), 1}), v6(0xfd77, uint16(n.Number), 0xfffe)}
}

// podPrefixes hold the addresses of the node's pods.
func (n *Node) podPrefixes() []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(n.Number), 0}), 24),
		netip.PrefixFrom(v6(0xfd77, uint16(n.Number), 0), 112),
	}
}

// attach gives a pod its eth0, the node's end, and routes both ways.
func attach(n *Node, p *Pod) error {
	podMAC, gatewayMAC := mac(macPod, n.Number, p.Number), mac(macGateway, n.Number, p.Number)
	err := n.NS.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = p.HostEnd(), gatewayMAC
		if err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: podMAC,
			PeerNamespace: netlink.NsFd(p.NS.FD()),
		}); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		return up(p.HostEnd(), n.gateways(), podMAC, p.Addrs(), hosts(p.Addrs()), p.Addrs())
	})
	if err != nil {
		return err
	}
	return p.NS.Do(func() error {
		if err := setUp(); err != nil {
			return err
		}
		everything := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
		return up("eth0", p.Addrs(), gatewayMAC, n.gateways(), everything, n.gateways())
	})
}

// Succeed takes the pod's eth0 away and gives its addresses to a new pod of another service account, which has a network
// namespace of its own. The pod itself stays, without a network, until the lab is closed.
func (p *Pod) Succeed(serviceAccount string) (*Pod, error) {
	n := p.Node
	next := &Pod{
		Name: serviceAccount, Namespace: p.Namespace, ServiceAccount: serviceAccount,
		Node: n, Number: p.Number, V4: p.V4, V6: p.V6, netns: p.netns + "s",
	}
	err := n.NS.Do(func() error {
		link, err := netlink.LinkByName(p.HostEnd())
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	if err != nil {
		return nil, fmt.Errorf("delete the link of %s: %w", p.Name, err)
	}
	if next.NS, err = n.lab.namespace(next.netns); err != nil {
		return nil, err
	}
	n.Pods = append(n.Pods, next)
	if err := attach(n, next); err != nil {
		return nil, fmt.Errorf("successor of %s: %w", p.Name, err)
	}
	err = next.NS.Do(func() (err error) { next.fresh, err = readSysctls(); return err })
	return next, err
}

// connect lays a veth between two nodes, with routes to each other's pods.
func connect(a, b *Node) error {
	err := a.NS.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = a.Uplink(b), mac(macUplink, a.Number, b.Number)
		if err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: attrs, PeerName: b.Uplink(a), PeerHardwareAddr: mac(macUplink, b.Number, a.Number),
			PeerNamespace: netlink.NsFd(b.NS.FD()),
		}); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		return up(a.Uplink(b), a.Addrs, mac(macUplink, b.Number, a.Number), b.Addrs, b.podPrefixes(), b.Addrs)
	})
	if err != nil {
		return err
	}
	return b.NS.Do(func() error {
		return up(b.Uplink(a), b.Addrs, mac(macUplink, a.Number, b.Number), a.Addrs, a.podPrefixes(), a.Addrs)
	})
}

func hosts(addrs []netip.Addr) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range addrs {
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	return out
}

// up brings an interface up with its own addresses, the link-layer address of its only neighbour, and routes: to the
// neighbour itself, and to prefixes by way of it. Neighbours are permanent, so that a capture is not about resolution.
func up(name string, own []netip.Addr, neighbour net.HardwareAddr, neighbours []netip.Addr, to []netip.Prefix, via []netip.Addr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	for _, a := range own {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s to %s: %w", a, name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	index := link.Attrs().Index
	for _, a := range neighbours {
		if err := netlink.NeighSet(&netlink.Neigh{
			LinkIndex: index, IP: a.AsSlice(), HardwareAddr: neighbour, State: netlink.NUD_PERMANENT,
		}); err != nil {
			return fmt.Errorf("add neighbour %s to %s: %w", a, name, err)
		}
		route := &netlink.Route{LinkIndex: index, Dst: ipNet(netip.PrefixFrom(a, a.BitLen())), Scope: netlink.SCOPE_LINK}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("add route to %s: %w", a, err)
		}
	}
	for i, prefix := range to {
		if prefix.Addr() == via[i] && prefix.IsSingleIP() {
			continue // the neighbour itself
		}
		route := &netlink.Route{LinkIndex: index, Dst: ipNet(prefix), Gw: via[i].AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteAdd(route); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add route to %s by %s: %w", prefix, via[i], err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
