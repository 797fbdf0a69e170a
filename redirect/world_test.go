// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/socket"
)

// Addresses of the two ends of a veth pair, in a namespace each.
var (
	pod4     = netip.MustParseAddr("10.99.0.1")
	pod6     = netip.MustParseAddr("fd99::1")
	outside4 = netip.MustParseAddr("10.99.0.2")
	outside6 = netip.MustParseAddr("fd99::2")
	// Nobody has these; the pod's default route leads to the outside.
	remote4 = netip.MustParseAddr("10.98.0.7")
	remote6 = netip.MustParseAddr("fd98::7")
)

// world is a pod's namespace and one outside of it, with a Node in between.
type world struct {
	t            testing.TB
	pod, outside *netns.NS
	podPath      string
	cfg          redirect.Config
	node         *redirect.Node
	maker        *socket.Maker
	redirected   *redirect.Pod
	listeners    map[redirect.Slot]int
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces and loads BPF programs: run it as root")
	}
}

func newWorld(t testing.TB) *world {
	t.Helper()
	needRoot(t)
	w := &world{t: t, listeners: map[redirect.Slot]int{}}
	w.pod, w.podPath = w.namespace("pod")
	w.outside, _ = w.namespace("out")
	for _, ns := range []*netns.NS{w.pod, w.outside} {
		// Link-local addresses at once: no duplicate address detection.
		w.in(ns, func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0) })
	}
	w.in(w.pod, func() error {
		peer := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(w.outside.FD())}
		return netlink.LinkAdd(peer)
	})
	w.in(w.pod, func() error { return setUpEth0(pod4, pod6, outside4, outside6) })
	w.in(w.outside, func() error { return setUpEth0(outside4, outside6, pod4, pod6) })
	w.in(w.pod, func() error { return os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("1"), 0) })
	// A bpffs of its own, so that other daemons' pins are not mistaken for its.
	w.cfg = redirect.Config{RunDir: filepath.Join(t.TempDir(), "run"), BPFFS: filepath.Join(t.TempDir(), "bpffs")}
	w.must(os.Mkdir(w.cfg.BPFFS, 0o700))
	t.Cleanup(func() {
		if err := unix.Unmount(w.cfg.BPFFS, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	t.Cleanup(w.cleanUp)
	return w
}

func (w *world) namespace(kind string) (*netns.NS, string) {
	w.t.Helper()
	name := fmt.Sprintf("culvert-redirect-%d-%s-%x", os.Getpid(), kind, time.Now().UnixNano()&0xffffff)
	ns, err := netns.CreateNamed(name)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		ns.Close()
		if err := netns.DeleteNamed(name); err != nil {
			w.t.Error(err)
		}
	})
	return ns, filepath.Join(netns.Dir, name)
}

func setUpEth0(v4, v6, gw4, gw6 netip.Addr) error {
	for _, l := range []string{"lo", "eth0"} {
		link, err := netlink.LinkByName(l)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		if l == "lo" {
			continue
		}
		for _, a := range []netip.Addr{v4, v6} {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen()-8, a.BitLen())}, Flags: unix.IFA_F_NODAD}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		for _, gw := range []netip.Addr{gw4, gw6} {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gw.AsSlice()}); err != nil {
				return fmt.Errorf("add default route by %s: %w", gw, err)
			}
		}
	}
	return nil
}

func (w *world) cleanUp() {
	if err := w.stop(); err != nil {
		w.t.Error(err)
	}
	if _, err := redirect.Cleanup(w.cfg); err != nil {
		w.t.Errorf("clean up: %v", err)
	}
}

func (w *world) in(ns *netns.NS, f func() error) {
	w.t.Helper()
	if err := ns.Do(f); err != nil {
		w.t.Fatal(err)
	}
}

// start opens the Node and enrols the pod, with a listener in each slot.
func (w *world) start() {
	w.t.Helper()
	var err error
	if w.node, err = redirect.Open(w.cfg); err != nil {
		w.t.Fatal(err)
	}
	if w.maker, err = socket.New(w.node.Own); err != nil {
		w.t.Fatal(err)
	}
	w.must(w.node.SetDestinations(map[netip.Addr]redirect.Destination{remote4: redirect.DestinationHBONE, remote6: redirect.DestinationHBONE}))
	w.redirected, err = w.node.AddPod(w.t.Context(), w.podConfig())
	if err != nil {
		w.t.Fatal(err)
	}
	w.open()
	w.must(w.redirected.Enrol())
	w.must(w.redirected.Carry())
}

// open fills the pod's slots.
func (w *world) open() {
	w.t.Helper()
	for _, l := range []struct {
		slot redirect.Slot
		at   string
	}{
		{redirect.Outbound4, "0.0.0.0:15001"}, {redirect.HBONE4, "0.0.0.0:15008"},
		{redirect.Outbound6, "[::]:15001"}, {redirect.HBONE6, "[::]:15008"},
	} {
		fd, err := w.maker.Listen(w.pod, netip.MustParseAddrPort(l.at), true)
		if err != nil {
			w.t.Fatal(err)
		}
		w.listeners[l.slot] = fd
		w.must(w.redirected.Listen(l.slot, fd))
	}
}

func (w *world) podConfig() redirect.PodConfig {
	return redirect.PodConfig{Name: "default/pod", NS: w.pod, NetnsPath: w.podPath, Addrs: []netip.Addr{pod4, pod6}}
}

// stop ends what a daemon's end ends.
func (w *world) stop() error {
	var errs []error
	for _, fd := range w.listeners {
		unix.Close(fd)
	}
	clear(w.listeners)
	if w.maker != nil {
		errs = append(errs, w.maker.Close())
		w.maker = nil
	}
	if w.node != nil {
		errs = append(errs, w.node.Close())
		w.node = nil
	}
	return errors.Join(errs...)
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// counted returns how often each decision was made while f ran, those that were.
func (w *world) counted(f func()) map[string]uint64 {
	w.t.Helper()
	before := w.node.Counters()
	f()
	out := map[string]uint64{}
	for name, n := range w.node.Counters() {
		if n != before[name] {
			out[name] = n - before[name]
		}
	}
	return out
}

// patience bounds what should happen at once.
const patience = 2 * time.Second

// tcp makes a blocking socket whose calls end after patience.
func tcp(v6 bool) (int, error) {
	family := unix.AF_INET
	if v6 {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err
	}
	return fd, limit(fd)
}

func limit(fd int) error {
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	return errors.Join(unix.SetNonblock(fd, false),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func addrPort(sa unix.Sockaddr, err error) netip.AddrPort {
	if err != nil {
		return netip.AddrPort{}
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func local(fd int) netip.AddrPort { return addrPort(unix.Getsockname(fd)) }
func peer(fd int) netip.AddrPort  { return addrPort(unix.Getpeername(fd)) }

// connect connects in ns. prepare may set options; unprivileged connects as
// another user, on a thread that is thrown away.
func (w *world) connect(ns *netns.NS, dst netip.AddrPort, prepare func(fd int) error) (int, error) {
	w.t.Helper()
	fd, err := -1, error(nil)
	derr := ns.Do(func() error {
		fd, err = connect(dst, prepare)
		return nil
	})
	if derr != nil {
		w.t.Fatal(derr)
	}
	w.closing(fd)
	return fd, err
}

func connect(dst netip.AddrPort, prepare func(fd int) error) (int, error) {
	fd, err := tcp(dst.Addr().Is6())
	if err != nil {
		return fd, err
	}
	if prepare != nil {
		if err := prepare(fd); err != nil {
			return fd, err
		}
	}
	return fd, finish(fd, unix.Connect(fd, sockaddr(dst)))
}

// finish waits for a connect that is under way: that of a non-blocking socket,
// or one that Go's runtime has interrupted.
func finish(fd int, err error) error {
	if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	if !poll(fd, unix.POLLOUT, patience) {
		return unix.ETIMEDOUT
	}
	e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && e != 0 {
		err = unix.Errno(e)
	}
	return err
}

// poll waits for events until the limit.
func poll(fd int, events int16, limit time.Duration) bool {
	for deadline := time.Now().Add(limit); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, int(max(time.Until(deadline), 0).Milliseconds()))
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n > 0
		}
	}
}

func (w *world) connectUnprivileged(ns *netns.NS, dst netip.AddrPort, prepare func(fd int) error) error {
	w.t.Helper()
	const nobody = 65534
	var fd int
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		if err := ns.Enter(); err != nil {
			done <- err
			return
		}
		// The system call itself, for this thread only.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			done <- errno
			return
		}
		var err error
		fd, err = connect(dst, prepare)
		done <- err
	}()
	err := <-done
	w.closing(fd)
	return err
}

func (w *world) closing(fd int) {
	if fd >= 0 {
		w.t.Cleanup(func() { unix.Close(fd) })
	}
}

// listen listens in ns as an application.
func (w *world) listen(ns *netns.NS, at netip.AddrPort) int {
	w.t.Helper()
	var fd int
	w.in(ns, func() (err error) {
		if fd, err = tcp(at.Addr().Is6()); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
		if at.Addr().Is6() {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
				return err
			}
		}
		if err := unix.Bind(fd, sockaddr(at)); err != nil {
			return err
		}
		return unix.Listen(fd, 16)
	})
	w.closing(fd)
	return fd
}

// accept accepts within patience.
func (w *world) accept(l int) int {
	w.t.Helper()
	w.must(limit(l))
	fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
	if err != nil {
		w.t.Fatalf("accept: %v", err)
	}
	w.closing(fd)
	w.must(limit(fd))
	return fd
}

// pending says whether a connection waits at a listener.
func pending(l int) bool { return poll(l, unix.POLLIN, 0) }

// exchange sends a word each way.
func (w *world) exchange(a, b int) {
	w.t.Helper()
	for _, d := range [][2]int{{a, b}, {b, a}} {
		if _, err := unix.Write(d[0], []byte("word")); err != nil {
			w.t.Fatalf("write: %v", err)
		}
		buf := make([]byte, 8)
		n, err := unix.Read(d[1], buf)
		if err != nil || string(buf[:n]) != "word" {
			w.t.Fatalf("read %q: %v", buf[:max(n, 0)], err)
		}
	}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// sysctl reads one in the pod's namespace.
func (w *world) sysctl(key string) string {
	w.t.Helper()
	var data []byte
	w.in(w.pod, func() (err error) {
		data, err = os.ReadFile("/proc/sys/" + key)
		return err
	})
	return strings.TrimSpace(string(data))
}

// upLo sets the calling thread's loopback up.
func upLo() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}
