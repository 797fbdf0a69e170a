// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Where a probe connects to: is_probe of bpf/culvert.h. Nobody has these, and
// what connects to them is carried whatever the maps say.
var (
	probe4 = netip.AddrFrom4([4]byte{192, 0, 0, 8}) // the dummy address, RFC 7600
	probe6 = netip.MustParseAddr("100::1")          // of the discard prefix, RFC 6666
)

// IsProbe says of a carried connection's destination that it is a probe: whoever
// takes it closes it, and has nothing to tell.
func IsProbe(dst netip.Addr) bool { return dst == probe4 || dst == probe6 }

const (
	probePort = 9 // discard
	probeWait = 5 * time.Second
	probePoll = 20 * time.Millisecond
)

// Probe shows that what the pod opens reaches its outbound listener, after Enrol
// and for each family that it has: a socket as an application's, made in its
// namespace, connects to an address that nobody has. Where the hooks do not work
// nothing leaves the pod, since that socket is bound to lo; it is the hook that
// unbinds it. A process that does not live below the hooked cgroup cannot make
// such a socket, and looks at hooks, steering and routes only.
func (p *Pod) Probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeWait)
	defer cancel()
	err := p.probe(ctx)
	if err != nil {
		return fmt.Errorf("probe pod %s: %w", p.cfg.Name, err)
	}
	return nil
}

func (p *Pod) probe(ctx context.Context) error {
	if err := p.n.checkHooks(); err != nil {
		return err
	}
	inside, err := p.n.isHooked()
	if err != nil {
		return err
	}
	if err := p.checkSteering(); err != nil {
		return err
	}
	for _, a := range p.Addrs() {
		// Before a socket is marked that would leave by another route.
		if err := p.cfg.NS.Do(func() error { return checkRoute(a) }); err != nil {
			return err
		}
		if !inside {
			continue
		}
		if err := p.connects(ctx, a); err != nil {
			return err
		}
	}
	return nil
}

// connects has a socket of the pod's connect, in the family of a.
func (p *Pod) connects(ctx context.Context, a netip.Addr) error {
	dst, hook := probe4, hooks[0]
	if a.Is6() {
		dst, hook = probe6, hooks[1]
	}
	fd := -1
	var cerr error
	err := p.cfg.NS.Do(func() (err error) {
		if fd, err = unix.Socket(family(a), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, loopback); err != nil {
			return err
		}
		cerr = unix.Connect(fd, sockaddr(dst, probePort))
		return nil
	})
	if fd >= 0 {
		defer unix.Close(fd)
	}
	if err != nil {
		return fmt.Errorf("make a socket in its namespace: %w", err)
	}
	if errors.Is(cerr, unix.ECONNREFUSED) {
		return fmt.Errorf("a connection of IPv%d was refused by the hook %s, or reset: the counters culvert_redirect_decisions_total say why", ipVersion(a), hook)
	}
	m, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err != nil {
		return fmt.Errorf("look at a socket's mark: %w", err)
	}
	if m != mark {
		return fmt.Errorf("a connection of IPv%d was not captured: the hook %s, at the cgroup %s, did not see it, or another program has undone what it did", ipVersion(a), hook, p.n.cgroupDir)
	}
	if cerr != nil && !errors.Is(cerr, unix.EINPROGRESS) && !errors.Is(cerr, unix.EINTR) {
		return fmt.Errorf("a connection of IPv%d was marked, and went no further: %w: are rule and route of the mark %#x in its namespace?", ipVersion(a), cerr, mark)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(probePoll.Milliseconds()))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for a connection: %w", err)
		}
		if n > 0 {
			break
		}
		if ctx.Err() != nil {
			return fmt.Errorf("a connection of IPv%d was marked, and did not arrive at the tunnel's listener: are rule, route and lookup program in its namespace, and is another lookup program there?", ipVersion(a))
		}
	}
	e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	// A reset comes from who has accepted it; a refusal from nobody.
	if errno := unix.Errno(e); err == nil && e != 0 && errno != unix.ECONNRESET {
		err = errno
	}
	if err != nil {
		return fmt.Errorf("a connection of IPv%d was marked, and did not arrive at the tunnel's listener: %w", ipVersion(a), err)
	}
	return nil
}

func sockaddr(a netip.Addr, port int) unix.Sockaddr {
	if a.Is6() {
		return &unix.SockaddrInet6{Addr: a.As16(), Port: port}
	}
	return &unix.SockaddrInet4{Addr: a.As4(), Port: port}
}

// isHooked says whether the process's own sockets are seen by the hooks.
func (n *Node) isHooked() (bool, error) {
	if n.cgroup == "/" {
		return true, nil
	}
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return false, fmt.Errorf("look for the process's cgroup: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if at, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return isBelow(at, n.cgroup), nil
		}
	}
	return false, nil
}

// checkSteering looks whether the pod's program is among its namespace's.
func (p *Pod) checkSteering() error {
	id, err := programOf(p.link)
	if err != nil {
		return err
	}
	found, err := lookups(p.cfg.NS)
	if err != nil {
		return err
	}
	if slices.Contains(found, id) {
		return nil
	}
	return errors.New("its lookup program is not attached to its namespace any more")
}

// checkRoute looks where the mark leads, on a thread in the namespace.
func checkRoute(a netip.Addr) error {
	dst := probe4
	if a.Is6() {
		dst = probe6
	}
	routes, err := netlink.RouteGetWithOptions(dst.AsSlice(), &netlink.RouteGetOptions{Mark: mark})
	if err != nil {
		return fmt.Errorf("look where the mark %#x leads: %w", mark, err)
	}
	for _, r := range routes {
		if src, ok := netip.AddrFromSlice(r.Src); !ok || r.LinkIndex != loopback || src.Unmap() != a {
			return fmt.Errorf("the mark %#x leads to device %d by table %d, and not to lo from %s: is there another rule for it in the namespace?", mark, r.LinkIndex, r.Table, a)
		}
	}
	return nil
}
