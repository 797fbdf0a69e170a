// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/snapshot"
	"github.com/culvert-mesh/culvert/telemetry"
)

// plainRig is a pod on loopback whose application listens elsewhere: its Sockets
// lead there.
type plainRig struct {
	*testing.T
	store  *snapshot.Store
	tunnel *Tunnel
	pod    *Pod
	at     netip.AddrPort // where plaintext is taken
	closed chan *telemetry.Connection

	mu     sync.Mutex // guards what follows
	app    netip.AddrPort
	failed error // of Deliver
	opened int
}

func newPlainRig(t *testing.T, at string, mode policy.Mode) *plainRig {
	t.Helper()
	r := &plainRig{T: t, store: snapshot.NewStore(), closed: make(chan *telemetry.Connection, 64)}
	r.set(mode)
	var err error
	r.tunnel, err = New(Config{Snapshots: r.store, Recorder: r, Logger: slog.New(slog.DiscardHandler), Loops: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.tunnel.Close)
	r.pod = r.tunnel.AddPod(PodConfig{Key: "demo_web_uid", Name: "web", Namespace: "demo", Sockets: r})
	r.at = r.serve(at)
	return r
}

func (r *plainRig) serve(at string) netip.AddrPort {
	r.Helper()
	l, err := net.Listen("tcp4", at)
	if err != nil {
		r.Fatal(err)
	}
	defer l.Close()
	rc, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		r.Fatal(err)
	}
	fd := -1
	_ = rc.Control(func(raw uintptr) { fd, err = unix.FcntlInt(raw, unix.F_DUPFD_CLOEXEC, 0) })
	if err == nil {
		err = r.pod.ServePlain(fd)
	}
	if err != nil {
		r.Fatal(err)
	}
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func (r *plainRig) set(mode policy.Mode) {
	r.store.Publish(nil, policy.NewSet(nil, policy.ModeRule{Name: "m", Namespace: "demo", Workload: "web", Mode: mode}))
}

// The Sockets of the pod.

func (r *plainRig) Dial(netip.Addr) (int, error) { return -1, unix.EAFNOSUPPORT }

func (r *plainRig) Take(bool) (int, bool) { return -1, false }

func (r *plainRig) Wait(_ bool, got func(int, error)) {
	go got(unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0))
}

func (r *plainRig) Deliver(fd int, _ netip.Addr, _ netip.AddrPort, _ func(uint16) bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed != nil {
		return r.failed
	}
	return unix.Connect(fd, &unix.SockaddrInet4{Port: int(r.app.Port()), Addr: r.app.Addr().As4()})
}

func (r *plainRig) MarkedListener(netip.AddrPort) (Listener, bool, error) {
	return Listener{}, false, nil
}

// The Recorder.

func (r *plainRig) Opened(*telemetry.Connection) telemetry.Flow {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opened++
	return telemetry.Flow{}
}

func (r *plainRig) Closed(_ *telemetry.Flow, c *telemetry.Connection) { r.closed <- c }

func (r *plainRig) Handshake(telemetry.Handshake) {}

// echo runs an application.
func (r *plainRig) echo() {
	r.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { l.Close() })
	r.mu.Lock()
	r.app = l.Addr().(*net.TCPAddr).AddrPort()
	r.mu.Unlock()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
}

func (r *plainRig) dial(to netip.AddrPort) *net.TCPConn {
	r.Helper()
	c, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(to))
	if errors.Is(err, unix.ECONNRESET) {
		return nil // so soon that connect has seen it
	}
	if err != nil {
		r.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	r.Cleanup(func() { c.Close() })
	return c
}

// served has a connection that the application answers.
func (r *plainRig) served() *net.TCPConn {
	r.Helper()
	c := r.dial(r.at)
	if c == nil {
		r.Fatal("it was reset at once")
	}
	if _, err := io.WriteString(c, "hello"); err != nil {
		r.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		r.Fatal(err)
	}
	return c
}

// ends wants a connection reset, and its record.
func (r *plainRig) ends(c *net.TCPConn, why telemetry.Reason) *telemetry.Connection {
	r.Helper()
	if c == nil {
		return r.record(why)
	}
	if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
		r.Errorf("it ended with %v, want a reset", err)
	}
	return r.record(why)
}

func (r *plainRig) record(why telemetry.Reason) *telemetry.Connection {
	r.Helper()
	select {
	case got := <-r.closed:
		if got.Reason != why || got.SecurityPolicy != telemetry.Plaintext || !got.Src.Identity.IsZero() {
			r.Errorf("recorded %+v, want %s in plaintext without an identity", got, why)
		}
		return got
	case <-time.After(20 * time.Second):
		r.Fatal("no record came")
		panic("unreachable")
	}
}

func (r *plainRig) neverOpened() {
	r.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.opened != 0 {
		r.Errorf("%d were opened", r.opened)
	}
}

// nothingLeft waits until nothing is held of connections that have ended.
func (r *plainRig) nothingLeft() {
	r.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		lists := 0
		for _, w := range r.tunnel.workers {
			done := make(chan int)
			w.Loop.Post(func() { done <- len(w.plain) })
			lists += <-done
		}
		r.tunnel.sources.mu.Lock()
		now := r.tunnel.sources.plain
		r.tunnel.sources.mu.Unlock()
		tuples := r.pod.tuples.n.Load()
		if lists == 0 && now == 0 && tuples == 0 {
			return
		}
		if time.Now().After(deadline) {
			r.Fatalf("%d connections in lists, %d counted, %d tuples", lists, now, tuples)
		}
	}
}

func TestPlainFollowsTheSnapshot(t *testing.T) {
	r := newPlainRig(t, "127.0.0.1:0", policy.Strict)
	r.echo()
	// Let in by the kernel, which is ahead of the snapshot.
	if c := r.ends(r.dial(r.at), telemetry.ReasonDenied); c.Rule != "m" || c.PolicyVersion != 1 || c.Pod != "demo_web_uid" {
		t.Errorf("recorded %+v", c)
	}
	r.neverOpened()
	r.set(policy.Permissive)
	c := r.served()
	if n := r.pod.tuples.n.Load(); n != 1 {
		t.Errorf("%d tuples are kept clear of deliveries", n)
	}
	r.set(policy.Permissive)
	if _, err := io.WriteString(c, "again"); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Error(err)
	}
	c.CloseWrite()
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if got := r.record(telemetry.ReasonOK); got.FromClient != 10 || got.ToClient != 10 || got.Rule != "m" {
		t.Errorf("recorded %+v", got)
	}
	c = r.served()
	r.set(policy.Strict)
	if got := r.ends(c, telemetry.ReasonDenied); got.Detail != "m" || got.PolicyVersion != 4 {
		t.Errorf("recorded %+v", got)
	}
	r.nothingLeft()
}

// What waits to be accepted while the port becomes STRICT goes by that.
func TestPlainThatWaitsFollowsTheSnapshot(t *testing.T) {
	r := newPlainRig(t, "127.0.0.1:0", policy.Permissive)
	r.echo()
	held, release := make(chan struct{}), make(chan struct{})
	r.pod.w.Loop.Post(func() { close(held); <-release })
	<-held
	c := r.dial(r.at)
	r.set(policy.Strict)
	close(release)
	if got := r.ends(c, telemetry.ReasonDenied); got.PolicyVersion != 2 {
		t.Errorf("recorded %+v", got)
	}
	r.neverOpened()
	r.nothingLeft()
}

func TestPlainRefusesOwnPorts(t *testing.T) {
	// Addresses of loopback that nobody else uses.
	r := newPlainRig(t, "127.15.0.6:15006", policy.Permissive)
	r.echo()
	r.ends(r.dial(r.at), telemetry.ReasonRefused)
	for _, port := range []int{OutboundPort, HBONEPort, MetricsPort, ReadyPort} {
		r.ends(r.dial(r.serve(fmt.Sprintf("127.15.0.6:%d", port))), telemetry.ReasonRefused)
	}
	r.nothingLeft()
}

func TestPlainIsBounded(t *testing.T) {
	r := newPlainRig(t, "127.0.0.1:0", policy.Permissive)
	r.tunnel.sources.mu.Lock()
	r.tunnel.sources.mostPlain = 2 * plainPart // two of one address
	r.tunnel.sources.mu.Unlock()
	r.echo()
	first, _ := r.served(), r.served()
	r.ends(r.dial(r.at), telemetry.ReasonLimit)
	first.Close()
	r.record(telemetry.ReasonOK)
	r.served()
}

// A pod that goes, and a client that goes while the application is asked.
func TestPlainEndsWithItsPod(t *testing.T) {
	r := newPlainRig(t, "127.0.0.1:0", policy.Permissive)
	r.echo()
	c := r.served()
	r.pod.Remove()
	r.ends(c, telemetry.ReasonDraining)
	r.nothingLeft()
}

func TestPlainEndsWithItsClient(t *testing.T) {
	r := newPlainRig(t, "127.0.0.1:0", policy.Permissive)
	// A listener whose queue is full answers no SYN.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	r.app, _ = addr(sa)
	r.mu.Unlock()
	r.dial(r.app) // takes the one place

	c := r.dial(r.at)
	if c == nil {
		t.Fatal("it was reset at once")
	}
	for deadline := time.Now().Add(20 * time.Second); r.pod.tuples.n.Load() == 0; {
		if time.Now().After(deadline) {
			t.Fatal("it was not accepted")
		}
	}
	_ = c.SetLinger(0)
	c.Close()
	if got := r.record(telemetry.ReasonReset); got.Detail != "by the source: connection reset by peer" {
		t.Errorf("recorded %+v", got)
	}
	r.nothingLeft()

	r.mu.Lock()
	r.failed = unix.ECONNREFUSED
	r.mu.Unlock()
	r.ends(r.dial(r.at), telemetry.ReasonRefused)
	r.nothingLeft()
	r.neverOpened()
}
