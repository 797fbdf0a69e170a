// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// detach takes one of a daemon's hooks away, as nothing of Culvert's would.
func (e *env) detach(d *lab.Daemon, hook string) {
	e.t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(e.pins(d), hook), nil)
	e.must(err)
	defer l.Close()
	e.must(l.Detach())
}

// onSocket does something to a connection's descriptor, in the pod.
func (e *env) onSocket(p *lab.Pod, c *net.TCPConn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	e.must(err)
	return p.Do(func() (err error) {
		cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) })
		return errors.Join(err, cerr)
	})
}

// TestCarriedStaysCarried: a process with CAP_NET_RAW may not take a carried
// connection off its way.
func TestCarriedStaysCarried(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		from, to := e.Pod(1, 1), e.Pod(2, 1)
		app, err := to.Echo(8080)
		e.must(err)
		unmark := func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0) }
		bind := func(fd int) error { return unix.BindToDevice(fd, "eth0") }

		wire := e.wire(marker)
		c := e.connect(from, app.Addr(family))
		for name, f := range map[string]func(int) error{"SO_MARK": unmark, "SO_BINDTODEVICE": bind} {
			if err := e.onSocket(from, c, f); !errors.Is(err, unix.EPERM) {
				t.Errorf("%s on a carried socket: %v, want %v", name, err, unix.EPERM)
			}
		}
		e.must(exchange(c, marker))
		if wire.Seen(0) != 0 || outside(wire) != 0 || inside(wire) == 0 {
			t.Errorf("the marker was seen %d times, in %d segments outside the tunnel", wire.Seen(0), outside(wire))
		}
		if n := e.sum(d[0], "culvert_redirect_decisions_total", "decision", "option_refused"); n != 2 {
			t.Errorf("%v refusals were counted, want 2", n)
		}

		// The control: without the hook the option is set, and the bytes are on the wire.
		e.detach(d[0], "setsockopt")
		plain := e.wire(marker)
		c = e.connect(from, app.Addr(family))
		e.must(e.onSocket(from, c, unmark))
		if err := exchange(c, marker); err == nil {
			t.Error("control: the exchange went through beside the tunnel")
		}
		if plain.Seen(0) == 0 {
			t.Error("control: the marker is not on the wire")
		}
	})
}

// TestUnknownDestinationIsLogged: a destination that is not carried any more when
// its SYN comes is refused by the daemon, and named. No hook of connect() can be
// made to wait until then, so there is none.
func TestUnknownDestinationIsLogged(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e := setup(t)
		d := e.start(lab.DaemonConfig{})
		from, nobody := e.Pod(1, 1), e.Pod(2, 3)
		known, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		plain, err := nobody.Echo(8080)
		e.must(err)
		e.detach(d[0], fmt.Sprintf("connect%d", family))
		dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0x53a) })
			return errors.Join(err, cerr)
		}}
		dialer.SetMultipathTCP(false)
		call := func(dst netip.AddrPort) error {
			ctx, cancel := context.WithTimeout(e.ctx, patience())
			defer cancel()
			c, err := from.DialWith(ctx, &dialer, dst)
			if err != nil {
				return err
			}
			defer c.Close()
			e.must(c.SetDeadline(time.Now().Add(patience())))
			return exchange(c, marker)
		}
		wire := e.wire(marker)
		if err := call(plain.Addr(family)); !isReset(err) {
			t.Errorf("an unknown destination: %v, want a reset", err)
		}
		if r := e.line(d[0], "outbound", plain.Addr(family)).String("reason"); r != "unknown_destination" {
			t.Errorf("reason %q, want unknown_destination", r)
		}
		if wire.Seen(0) != 0 || outside(wire) != 0 {
			t.Error("it is on the wire")
		}
		e.must(call(known.Addr(family))) // the control
	})
}

// TestEnrolmentIsProbed: a pod is served once a connection of its own was seen to
// reach the tunnel, in each family that it has; until then it is refused.
func TestEnrolmentIsProbed(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e := setup(t)
		from := e.Pod(1, 1)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		d := e.start(lab.DaemonConfig{Pods: []*lab.Pod{}})
		// Somebody else's rule, before ours: what has the mark leaves by eth0.
		rule := netlink.NewRule()
		mask := uint32(0xffffffff)
		rule.Mark, rule.Mask, rule.Table, rule.Priority = 0x53a, &mask, unix.RT_TABLE_MAIN, 7
		rule.Family = map[int]int{4: unix.AF_INET, 6: unix.AF_INET6}[family]
		e.must(from.Do(func() error { return netlink.RuleAdd(rule) }))
		wire := e.wire(marker)
		for i, daemon := range d {
			e.reloads(daemon, "pods", "ok", func() {
				e.replace(daemon.Node, "pods.yaml", e.text("pods", []podEntry{entryOf(e.Pod(i+1, 1)), entryOf(e.Pod(i+1, 2))}))
			})
		}
		e.settled(d[1], 2)
		e.must(lab.Until(e.ctx, "the failure is said", func() error {
			if log := d[0].LogTail(20); !strings.Contains(log, "pod is not enrolled") || !strings.Contains(log, "the mark 0x53a leads to") {
				return errors.New("it is not in the log")
			}
			return nil
		}))
		if err := e.try(from, app.Addr(family)); !isRefused(err) {
			t.Errorf("a pod whose probe has failed: %v, want it refused", err)
		}
		if n, _ := wire.Count(func(s capture.Segment) bool { return s.Between(lab.PodCIDRs()...) && !s.Port(hbonePort) }); n != 0 {
			t.Errorf("%d segments have left the pod", n)
		}
		e.must(from.Do(func() error { return netlink.RuleDel(rule) })) // the control
		e.settled(d[0], 2)
		e.must(e.call(from, app.Addr(family)))
		if n := e.sum(d[0], "culvert_redirect_decisions_total", "decision", "steer_probe"); n < 4 {
			t.Errorf("%v probes have arrived, want one for each family of two pods", n)
		}
		e.line(d[0], "outbound", app.Addr(family))
		if log, err := os.ReadFile(filepath.Join(d[0].Node.Dir, "access.log")); err != nil || strings.Contains(string(log), `:9"`) {
			t.Errorf("probes are in the access log (%v):\n%s", err, log)
		}
	})
}

// TestTwoInstances: of two daemons that list the same namespace the first has it;
// the other says whose it is, changes nothing, and has it once it is free.
func TestTwoInstances(t *testing.T) {
	e, d := mesh(t)
	shared := e.Pod(1, 2)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	traffic := e.steady(shared, app.Addr(4))
	before := e.Nodes[0].State(shared)
	both := []podEntry{entryOf(e.Pod(2, 1)), entryOf(e.Pod(2, 2)), entryOf(shared)}
	e.reloads(d[1], "pods", "ok", func() { e.replace(d[1].Node, "pods.yaml", e.text("pods", both)) })
	e.must(lab.Until(e.ctx, "the refusal is said", func() error {
		if log := d[1].LogTail(20); !strings.Contains(log, "enrolled by another instance") || !strings.Contains(log, "run directory: "+d[0].RunDir()) {
			return errors.New("it is not in the log")
		}
		if n := e.sum(d[1], "culvert_pods", "state", "enrolling"); n != 1 {
			return fmt.Errorf("%v pods are enrolling", n)
		}
		return nil
	}))
	traffic.whole(t, 1)
	if after := e.Nodes[0].State(shared); after != before {
		t.Errorf("the namespace has changed:\n%s\nit was:\n%s", after, before)
	}
	e.setPods(d[0], entryOf(e.Pod(1, 1)))
	e.settled(d[1], 3) // the control
	wire := e.wire(marker)
	e.must(e.call(shared, app.Addr(6)))
	e.line(d[1], "outbound", app.Addr(6))
	if wire.Seen(0) != 0 || outside(wire) != 0 {
		t.Error("the second one does not carry it")
	}
}

// TestAddressComesAgain: a pod that loses its address is refused, and carried again
// once it has it.
func TestAddressComesAgain(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, _ := mesh(t)
		from := e.Pod(1, 1)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		e.must(e.call(from, app.Addr(family)))
		nl := map[int]int{4: unix.AF_INET, 6: unix.AF_INET6}[family]
		wire := e.wire(marker)
		var eth0 netlink.Link
		var addr netlink.Addr
		var routes []netlink.Route
		e.must(from.Do(func() (err error) {
			if eth0, err = netlink.LinkByName("eth0"); err != nil {
				return err
			}
			all, err := netlink.AddrList(eth0, nl)
			if err != nil {
				return err
			}
			for _, a := range all {
				if ip, _ := netip.AddrFromSlice(a.IP); ip.Unmap() == from.Addr(family) {
					addr = a
				}
			}
			if routes, err = netlink.RouteListFiltered(nl, &netlink.Route{LinkIndex: eth0.Attrs().Index}, netlink.RT_FILTER_OIF); err != nil {
				return err
			}
			return netlink.AddrDel(eth0, &addr)
		}))
		if err := e.call(from, app.Addr(family)); err == nil {
			t.Error("control: it is carried without its address")
		}
		e.must(from.Do(func() error {
			again := &netlink.Addr{IPNet: addr.IPNet, Flags: unix.IFA_F_NODAD}
			if family == 4 {
				again.Flags = 0
			}
			if err := netlink.AddrAdd(eth0, again); err != nil {
				return err
			}
			for _, r := range routes { // those that went too
				if r.Protocol != unix.RTPROT_KERNEL {
					if err := netlink.RouteReplace(&r); err != nil {
						return err
					}
				}
			}
			return nil
		}))
		e.must(lab.Until(e.ctx, "the pod is carried again", func() error { return e.call(from, app.Addr(family)) }))
		if wire.Seen(0) != 0 || outside(wire) != 0 {
			t.Errorf("the marker was seen %d times, in %d segments outside the tunnel", wire.Seen(0), outside(wire))
		}
	})
}
