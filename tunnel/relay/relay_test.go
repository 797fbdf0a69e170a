// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/relay"
	"github.com/culvert-mesh/culvert/tunnel/session"
)

// rig is two trunks that face each other, each on a loop of its own, and the
// applications behind them.
type rig struct {
	t              *testing.T
	client, server *relay.Worker
	trunk          *relay.Trunk // the client's
	far            *relay.Trunk
	serve          func(net.Conn) // the application behind the server
	ends           chan end
	closed         chan error
	apps           sync.WaitGroup
}

type end struct {
	side           string
	how            relay.End
	detail         string
	sent, received uint64
}

func newRig(t *testing.T, loops int, serve func(net.Conn)) *rig {
	t.Helper()
	r := &rig{t: t, serve: serve, ends: make(chan end, 1<<16), closed: make(chan error, 2)}
	r.client = r.worker()
	r.server = r.client
	if loops > 1 {
		r.server = r.worker()
	}
	c, s := pair(t)
	a, b := secrets(), secrets()
	r.trunk = r.newTrunk(r.client, c, record.Secrets{Suite: tls.TLS_AES_128_GCM_SHA256, Read: clone(a), Write: clone(b)}, h2.Config{Client: true})
	r.far = r.newTrunk(r.server, s, record.Secrets{Suite: tls.TLS_AES_128_GCM_SHA256, Read: b, Write: a}, h2.Config{})
	return r
}

func clone(b []byte) []byte { return append([]byte(nil), b...) }

func secrets() []byte {
	b := make([]byte, 32)
	rand.Read(b)
	return b
}

func (r *rig) worker() *relay.Worker {
	l, err := loop.New()
	if err != nil {
		r.t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(l.Run)
	r.t.Cleanup(func() { l.Stop(); running.Wait(); r.apps.Wait() })
	return relay.NewWorker(l)
}

func (r *rig) newTrunk(w *relay.Worker, fd int, keys record.Secrets, cfg h2.Config) *relay.Trunk {
	layer, err := record.New(keys)
	if err != nil {
		r.t.Fatal(err)
	}
	var t *relay.Trunk
	on(w, func() {
		t, err = w.NewTrunk(fd, session.New(layer, h2.New(cfg), nil), &owner{r: r, w: w}, relay.TrunkConfig{})
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return t
}

func on(w *relay.Worker, f func()) {
	done := make(chan struct{})
	if w.Loop.Post(func() { defer close(done); f() }) {
		<-done
	}
}

func pair(t *testing.T) (int, int) {
	t.Helper()
	// TCP on loopback: resets and half-closes are what they are in life.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return raw(t, a), raw(t, b)
}

func raw(t *testing.T, c net.Conn) int {
	t.Helper()
	rc, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	_ = rc.Control(func(f uintptr) { fd, err = unix.FcntlInt(f, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	return fd
}

func netConn(t *testing.T, fd int) net.Conn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "app")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// owner owns trunks; it answers requests by making an application.
type owner struct {
	r *rig
	w *relay.Worker
}

func (o *owner) Established(*relay.Trunk)         {}
func (o *owner) Closed(_ *relay.Trunk, err error) { o.r.closed <- err }
func (o *owner) Request(t *relay.Trunk, st *h2.Stream, _ []hpack.HeaderField) {
	a, b := pair(o.r.t)
	app := netConn(o.r.t, b)
	o.r.apps.Go(func() { defer app.Close(); o.r.serve(app) })
	r, err := o.w.Connecting(a, &party{r: o.r, side: "server", st: st})
	if err != nil {
		o.r.t.Error(err)
		return
	}
	r.Attach(t, st)
	r.Established()
}

// party owns a relay.
type party struct {
	r    *rig
	side string
	st   *h2.Stream
}

func (p *party) Connected(r *relay.Relay, err error) {
	if err := r.Trunk().Session().H2.Respond(p.st, []hpack.HeaderField{{Name: ":status", Value: "200"}}, false); err != nil {
		r.Abort(http2.ErrCodeInternal, err.Error())
		return
	}
	r.Trunk().Send()
	r.Open()
}
func (p *party) Response(r *relay.Relay, _ []hpack.HeaderField) { r.Open() }
func (p *party) Refused(r *relay.Relay)                         { r.Abort(http2.ErrCodeCancel, "refused") }
func (p *party) Closed(r *relay.Relay, how relay.End, detail string) {
	p.r.ends <- end{p.side, how, detail, r.Sent(), r.Received()}
}

// dial is what an application does: it gets a connection through the tunnel.
func (r *rig) dial() *net.TCPConn {
	r.t.Helper()
	a, b := pair(r.t)
	var err error
	on(r.client, func() {
		var rl *relay.Relay
		if rl, err = r.client.Waiting(a, &party{r: r, side: "client"}); err == nil {
			err = r.trunk.Open(rl, []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "10.0.0.1:80"}})
		}
	})
	if err != nil {
		r.t.Fatal(err)
	}
	c := netConn(r.t, b).(*net.TCPConn)
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	r.t.Cleanup(func() { c.Close() })
	return c
}

func (r *rig) end() end {
	r.t.Helper()
	select {
	case e := <-r.ends:
		return e
	case <-time.After(20 * time.Second):
		r.t.Fatal("a relay has not ended")
		panic("unreachable")
	}
}

func echo(c net.Conn) {
	if _, err := io.Copy(c, c); err == nil {
		_ = c.(*net.TCPConn).CloseWrite()
	}
}

func TestExchangeAndCleanEnd(t *testing.T) {
	for _, loops := range []int{1, 2} {
		r := newRig(t, loops, echo)
		c := r.dial()
		for _, size := range []int{1, 100, 16375, 16376, 70000, 1 << 20} {
			want := make([]byte, size)
			rand.Read(want)
			go func() { _, _ = c.Write(want) }()
			got := make([]byte, size)
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d loops, %d bytes: came back different, %v", loops, size, err)
			}
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
			t.Fatalf("after the half-close: %q, %v", b, err)
		}
		a, b := r.end(), r.end()
		if a.how != relay.EndClean || b.how != relay.EndClean || a.sent != b.received || a.received != b.sent {
			t.Fatalf("ends %+v and %+v, want clean ones that agree", a, b)
		}
	}
}

func TestManyStreamsAtOnce(t *testing.T) {
	r := newRig(t, 2, echo)
	var all sync.WaitGroup
	for i := range 100 {
		c := r.dial()
		all.Go(func() {
			want := bytes.Repeat([]byte(fmt.Sprintf("stream %d;", i)), 20000)
			go func() { _, _ = c.Write(want); _ = c.CloseWrite() }()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("stream %d: %d bytes of %d, %v", i, len(got), len(want), err)
			}
		})
	}
	all.Wait()
}

func TestResetCrosses(t *testing.T) {
	saw := make(chan error, 1)
	r := newRig(t, 2, func(c net.Conn) {
		_, err := io.Copy(io.Discard, c)
		saw <- err
	})
	c := r.dial()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_ = c.SetLinger(0)
	c.Close()
	if err := <-saw; !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("the server saw %v, want a reset", err)
	}
}

// Data followed by a reset, before and during a wait: the relay must read to
// the error and not wait for an edge that does not come.
func TestDataFollowedByResetNeverHangs(t *testing.T) {
	const n = 1000
	saw := make(chan error, n)
	r := newRig(t, 2, func(c net.Conn) {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		_, err := io.Copy(io.Discard, c)
		saw <- err
	})
	buf := make([]byte, 64<<10)
	for i := range n {
		c := r.dial()
		if i%2 == 0 { // during a wait: the far end answers nothing, the relay is in epoll
			if _, err := c.Write(buf[:1]); err != nil {
				t.Fatal(err)
			}
		}
		_, _ = c.Write(buf[:1+i*60])
		_ = c.SetLinger(0)
		c.Close()
	}
	for i := range n {
		var ne net.Error
		if err := <-saw; err == nil || errors.As(err, &ne) && ne.Timeout() {
			t.Fatalf("server %d saw %v, want a reset", i, err)
		}
	}
	for range 2 * n {
		r.end()
	}
}

func TestStuckReaderStallsNobody(t *testing.T) {
	release := make(chan struct{})
	first := true
	var mu sync.Mutex
	r := newRig(t, 2, func(c net.Conn) {
		mu.Lock()
		stuck := first
		first = false
		mu.Unlock()
		if stuck {
			<-release
			_, _ = io.Copy(io.Discard, c)
			return
		}
		echo(c)
	})
	s := r.dial()
	wrote := make(chan struct{})
	go func() { defer close(wrote); _, _ = s.Write(make([]byte, 64<<20)) }()
	var all sync.WaitGroup
	for range 99 {
		c := r.dial()
		all.Go(func() {
			msg := bytes.Repeat([]byte("m"), 100<<10)
			go func() { _, _ = c.Write(msg) }()
			if _, err := io.ReadFull(c, make([]byte, len(msg))); err != nil {
				t.Errorf("a sibling of the stuck stream: %v", err)
			}
		})
	}
	all.Wait()
	select {
	case <-wrote:
		t.Error("the stuck stream was not stuck")
	default:
	}
	close(release)
	<-wrote
	_ = s.CloseWrite()
}

func TestLostTrunkResetsBothApplications(t *testing.T) {
	saw := make(chan error, 1)
	r := newRig(t, 2, func(c net.Conn) {
		_, _ = io.ReadFull(c, make([]byte, 1))
		_, _ = c.Write([]byte("y"))
		_, err := io.Copy(io.Discard, c)
		saw <- err
	})
	c := r.dial()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	on(r.client, func() { r.trunk.Close(errors.New("gone")) })
	if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client saw %v, want a reset", err)
	}
	if err := <-saw; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the server saw %v, want a reset", err)
	}
}
