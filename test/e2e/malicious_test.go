// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// What a process in a pod may try against the tunnel, besides what other tests
// have whole: requests that are not to be carried (TestStatus), a spoofed
// forwarded (TestForwardedIsNotTrusted), certificates that are not the mesh's
// (TestPeerCheck), the node's own addresses in the programs (redirect).

// TestOwnPortsFromPods: the tunnel's ports, dialled by an enrolled pod and by one
// that is not, on itself, on others of its node and the other node, and on the
// nodes: nothing is answered but TLS on 15008, and nothing is reached through it.
func TestOwnPortsFromPods(t *testing.T) {
	e, daemons := mesh(t)
	from := map[string]*lab.Pod{"enrolled": e.Pod(1, 1), "stranger": e.Pod(1, 3)}
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		to := map[string]netip.Addr{
			"another_of_the_node": e.Pod(1, 2).Addr(family),
			"another_node's":      e.Pod(2, 1).Addr(family),
			"the_node":            e.Nodes[0].Addrs[map[int]int{4: 0, 6: 1}[family]],
			"the_other_node":      e.Nodes[1].Addrs[map[int]int{4: 0, 6: 1}[family]],
		}
		for who, pod := range from {
			to["itself"] = pod.Addr(family)
			for where, addr := range to {
				for _, port := range []uint16{15001, 15006, 15008, 15020, 15021} {
					t.Run(fmt.Sprintf("%s/%s/%d", who, where, port), func(t *testing.T) {
						if got := e.in(t).say(pod, netip.AddrPortFrom(addr, port)); len(got) > 7 { // an alert
							t.Errorf("it was answered with %q", got)
						}
					})
				}
			}
		}
		// The controls: the same bytes are answered by what listens, and the
		// daemons carry what they are to.
		app, err := e.Pod(1, 1).Echo(0)
		e.must(err)
		if got := e.say(e.Pod(1, 1), app.Addr(family)); len(got) == 0 {
			t.Error("control: an application on the same pod does not answer")
		}
		far, err := e.Pod(2, 1).Echo(0)
		e.must(err)
		e.must(e.try(e.Pod(1, 1), far.Addr(family)))
	})
	for _, d := range daemons {
		if n := e.sum(d, "culvert_connections_closed_total", "reason", "unlisted"); n != 0 {
			t.Errorf("%v connections ended for no reason of the list", n)
		}
	}
}

// say sends an HTTP request with the marker and returns what comes back.
func (e *env) say(from *lab.Pod, to netip.AddrPort) []byte {
	ctx, cancel := context.WithTimeout(e.ctx, time.Second)
	defer cancel()
	c, err := from.Dial(ctx, to)
	if err != nil {
		return nil
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Second))
	_, _ = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"+marker)
	_ = c.CloseWrite()
	got, _ := io.ReadAll(c)
	return got
}

// TestSpoofedSource: an application with CAP_NET_ADMIN binds to another pod's
// address. Nobody is shown that address for it: neither the application that it
// calls nor the log; and as a peer of its own it gets no session.
func TestSpoofedSource(t *testing.T) {
	e, daemons := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	families(t, func(t *testing.T, family int) {
		e := e.in(t)
		victim := e.Pod(1, 2).Addr(family)
		spoof := func(from *lab.Pod, to netip.AddrPort) error {
			d := &net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(victim, 0)), Control: func(_, _ string, c syscall.RawConn) (err error) {
				cerr := c.Control(func(fd uintptr) {
					if family == 4 {
						err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
					} else {
						err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
					}
				})
				if err == nil {
					err = cerr
				}
				return err
			}}
			ctx, cancel := context.WithTimeout(e.ctx, time.Second)
			defer cancel()
			c, err := from.DialWith(ctx, d, to)
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(time.Second))
			return exchange(c, marker)
		}
		shown := func() (n int) {
			for _, p := range app.Peers() {
				if p.Addr() == victim {
					n++
				}
			}
			return n
		}
		before := shown()
		err := spoof(e.Pod(1, 1), app.Addr(family))
		t.Logf("an enrolled pod with a spoofed source: %v", err)
		if n := shown() - before; n != 0 {
			t.Errorf("the application was shown the victim's address for %d connections", n)
		}
		lines, err := daemons[1].AccessLog()
		e.must(err)
		for _, l := range lines {
			if l.String("direction") == "inbound" && l.String("src.identity") == e.Pod(1, 1).Identity() && netip.MustParseAddrPort(l.String("src.addr")).Addr() == victim {
				t.Errorf("the destination's log shows the victim's address: %v", l)
			}
		}
		if err := spoof(e.Pod(1, 3), netip.AddrPortFrom(e.Pod(2, 1).Addr(family), hbonePort)); err == nil {
			t.Error("a stranger with a spoofed source was answered on the tunnel's port")
		}
		// The control: the victim's own connection is shown as the victim's.
		e.must(e.try(e.Pod(1, 2), app.Addr(family)))
		if n := shown() - before; n != 1 {
			t.Errorf("control: the victim's own connection is shown %d times", n)
		}
	})
}
