// SPDX-License-Identifier: Apache-2.0

// Package e2e runs the real daemon on real packets: nodes and pods are network
// namespaces, the wire between the nodes is captured by a witness of its own.
// MATRIX.tsv lists the behaviours, each with the control that makes its oracle
// ring. Needs root.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// prefix begins the names of all that these tests make.
const prefix = "culvert-e2e"

// hbonePort is the tunnel's port between pods.
const hbonePort = 15008

// ztunnel is the daemon's binary, built by TestMain unless it is given: a machine
// without Go can run these tests too.
var ztunnel string

// kernelOnly is for machines that are run for their kernel, and are slow.
var kernelOnly = flag.Bool("kernel", false, "skip what is decided in user space")

// userSpace begins a test of what is decided in user space, on sockets that other
// tests try: no kernel changes it.
func userSpace(t *testing.T) {
	t.Helper()
	if *kernelOnly {
		t.Skip("decided in user space; asked for was what a kernel may change")
	}
}

func TestMain(m *testing.M) {
	if address := os.Getenv(echoAt); address != "" {
		fmt.Fprintln(os.Stderr, echo(address))
		os.Exit(1)
	}
	os.Exit(lab.Main(prefix, &ztunnel, m.Run))
}

// env is a lab of two nodes with three pods each. The first two of each node
// are enrolled unless a test says otherwise; the third is a neighbour.
type env struct {
	*lab.Lab
	t   *testing.T
	ctx context.Context
}

// setup builds the lab, without daemons.
func setup(t *testing.T) *env {
	t.Helper()
	return setupWith(t, 3)
}

// setupWith builds one with so many pods on each node.
func setupWith(t *testing.T, pods int) *env {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second*lab.Slowness())
	l, err := lab.New(ctx, lab.Config{Nodes: 2, PodsPerNode: pods, Prefix: prefix})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	e := &env{Lab: l, t: t, ctx: ctx}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.Tails(15, "ztunnel.log", "access.log"))
		}
		if err := l.Close(); err != nil {
			t.Errorf("close lab: %v", err)
		}
		cancel()
	})
	return e
}

// takes gives a test that takes longer than others its time.
func (e *env) takes(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	e.t.Cleanup(cancel)
	e.ctx = ctx
}

// mesh is setup with a daemon on each node.
func mesh(t *testing.T) (*env, []*lab.Daemon) {
	t.Helper()
	e := setup(t)
	return e, e.start(lab.DaemonConfig{})
}

// start starts a daemon on each node.
func (e *env) start(cfg lab.DaemonConfig) []*lab.Daemon {
	e.t.Helper()
	var out []*lab.Daemon
	for _, n := range e.Nodes {
		out = append(out, e.startOn(n, cfg))
	}
	return out
}

// startOn starts a node's daemon, which enrols the first two pods and knows those of
// both nodes, unless it is told otherwise.
func (e *env) startOn(n *lab.Node, cfg lab.DaemonConfig) *lab.Daemon {
	e.t.Helper()
	if cfg.Binary == "" {
		cfg.Binary = ztunnel
	}
	if cfg.Pods == nil {
		cfg.Pods = n.Pods[:2]
	}
	if cfg.Workloads == nil {
		cfg.Workloads = e.enrolled()
	}
	d, err := n.StartDaemon(e.ctx, cfg)
	e.must(err)
	return d
}

// wrapped is a ztunnel that does something else in the shell before it runs. It is
// to be made before the lab, which cleans up with it.
func wrapped(t *testing.T, first string) (binary string) {
	t.Helper()
	binary = filepath.Join(t.TempDir(), "ztunnel")
	script := fmt.Sprintf("#!/bin/sh\n[ \"$1\" != run ] || %s\nexec %s \"$@\"\n", first, ztunnel)
	if err := os.WriteFile(binary, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return binary
}

// enrolled are the workloads of the first two pods of each node.
func (e *env) enrolled() []lab.Workload {
	var out []lab.Workload
	for _, n := range e.Nodes {
		for _, p := range n.Pods[:2] {
			out = append(out, p.Workload())
		}
	}
	return out
}

// wire captures between the nodes.
func (e *env) wire(markers ...string) *capture.Capture {
	e.t.Helper()
	return e.capture(capture.Config{NS: e.Nodes[0].NS, Interface: e.Nodes[0].Uplink(e.Nodes[1]), Markers: markers})
}

func (e *env) capture(cfg capture.Config) *capture.Capture {
	e.t.Helper()
	c, err := capture.Start(cfg)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			e.t.Errorf("the capture is not complete: %v", err)
		}
	})
	return c
}

// outside counts payload-bearing segments between pods that are not the
// tunnel's.
func outside(c *capture.Capture) int {
	n, _ := c.Payload(func(s capture.Segment) bool { return s.Between(lab.PodCIDRs()...) && !s.Port(hbonePort) })
	return n
}

// inside is the payload between pods on the tunnel's port.
func inside(c *capture.Capture) int64 {
	_, b := c.Payload(func(s capture.Segment) bool { return s.Between(lab.PodCIDRs()...) && s.Port(hbonePort) })
	return b
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// dial connects from a pod within five seconds; the connection is of use for twenty.
func (e *env) dial(p *lab.Pod, to netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(e.ctx, scaled(5*time.Second))
	defer cancel()
	c, err := p.Dial(ctx, to)
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second * lab.Slowness()))
		e.t.Cleanup(func() { c.Close() })
	}
	return c, err
}

func (e *env) connect(p *lab.Pod, to netip.AddrPort) *net.TCPConn {
	e.t.Helper()
	c, err := e.dial(p, to)
	if err != nil {
		e.t.Fatalf("connect from %s to %s: %v", p.Name, to, err)
	}
	return c
}

// line waits for one line of the daemon's access log for a connection to dst.
func (e *env) line(d *lab.Daemon, direction string, dst netip.AddrPort) lab.Entry {
	e.t.Helper()
	lines := e.lines(d, 1, direction, dst)
	return lines[len(lines)-1]
}

func (e *env) lines(d *lab.Daemon, n int, direction string, dst netip.AddrPort) []lab.Entry {
	e.t.Helper()
	found, err := d.WaitAccessLog(e.ctx, n, func(l lab.Entry) bool {
		return l.String("direction") == direction && l.String("dst.addr") == dst.String()
	})
	if err != nil {
		e.t.Fatal(err)
	}
	return found
}

// sum is a metric of a daemon.
func (e *env) sum(d *lab.Daemon, name string, labels ...string) float64 {
	e.t.Helper()
	m, err := d.Metrics(e.ctx)
	if err != nil {
		e.t.Fatal(err)
	}
	return m.Sum(name, labels...)
}

// families runs a test for IPv4 and IPv6.
func families(t *testing.T, f func(t *testing.T, family int)) {
	for _, v := range []int{4, 6} {
		t.Run(fmt.Sprintf("v%d", v), func(t *testing.T) { f(t, v) })
	}
}

// atOnce bounds what is to be refused at once.
func atOnce() time.Duration { return 50 * time.Millisecond * lab.Slowness() }

var (
	exchange = lab.Exchange
	isReset  = lab.IsReset
)

func isRefused(err error) bool { return err != nil && strings.Contains(err.Error(), "refused") }

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}
