// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"crypto/rand"
	"crypto/tls"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testtcp"
	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/relay"
	"github.com/culvert-mesh/culvert/tunnel/session"
)

// patience is how long anything may take that is expected to happen.
var patience = 20 * time.Second * lab.Slowness()

// pace is the step of long loops: an emulated machine tries each tenth size.
var pace = int(lab.Slowness())

// rigConfig says what a rig is made of.
type rigConfig struct {
	loops          int                                // of the two trunks: 1 or 2
	serve          func(c net.Conn, authority string) // the application behind the server
	client, server relay.TrunkConfig

	// Bytes of the socket buffers of each side's applications, and of ours
	// towards them; 0: the kernel's choice.
	buffers, farBuffers int

	clog func(authority string) bool // whether an application's socket is full from the start; nil: none

	memory int64 // of the budget of all workers; 0: the default

	request func(w *relay.Worker, t *relay.Trunk, st *h2.Stream, serve func() *relay.Relay) // instead of an application at once
	refused func(*relay.Relay)
	ended   func(end) // instead of rig.ends
}

// rig is two trunks that face each other, each on a loop of its own, and the
// applications behind them.
type rig struct {
	t              testing.TB
	cfg            rigConfig
	budget         *relay.Budget
	shed           atomic.Int64 // streams
	client, server *relay.Worker
	trunk          *relay.Trunk // the client's
	far            *relay.Trunk
	ends           chan end
	closed         chan closed
	apps           sync.WaitGroup
}

type end struct {
	side           string
	how            relay.End
	detail         string
	sent, received uint64
}

type closed struct {
	side string
	err  error
}

// newRig has a server for an application.
func newRig(t testing.TB, loops int, serve func(net.Conn)) *rig {
	t.Helper()
	return newRigWith(t, rigConfig{loops: loops, serve: func(c net.Conn, _ string) { serve(c) }})
}

func newRigWith(t testing.TB, cfg rigConfig) *rig {
	t.Helper()
	r := emptyRig(t, cfg)
	r.client = r.worker()
	r.server = r.client
	if cfg.loops > 1 {
		r.server = r.worker()
	}
	r.connect()
	return r
}

func emptyRig(t testing.TB, cfg rigConfig) *rig {
	r := &rig{t: t, cfg: cfg, ends: make(chan end, 1<<16), closed: make(chan closed, 16)}
	// Registered first and so run last: loops close what applications wait for.
	t.Cleanup(r.apps.Wait)
	r.budget = relay.NewBudget(cfg.memory, func(s relay.Shed) { r.shed.Add(int64(s.Streams)) })
	return r
}

// connect makes the two trunks.
func (r *rig) connect() {
	r.t.Helper()
	c, s := pair(r.t)
	ours, theirs := keys()
	r.trunk = r.newTrunk(r.client, "client", c, ours, r.cfg.client)
	r.far = r.newTrunk(r.server, "server", s, theirs, r.cfg.server)
}

// keys are both sides of a connection's, the client's first.
func keys() (client, server record.Secrets) {
	a, b := make([]byte, 32), make([]byte, 32)
	rand.Read(a)
	rand.Read(b)
	const suite = tls.TLS_AES_128_GCM_SHA256
	return record.Secrets{Suite: suite, Client: true, Read: clone(a), Write: clone(b)}, record.Secrets{Suite: suite, Read: b, Write: a}
}

func clone(b []byte) []byte { return append([]byte(nil), b...) }

func (r *rig) worker() *relay.Worker {
	r.t.Helper()
	l, err := loop.New()
	if err != nil {
		r.t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(l.Run)
	r.t.Cleanup(func() { l.Stop(); running.Wait() })
	return relay.NewWorker(l, r.budget)
}

func (r *rig) newTrunk(w *relay.Worker, side string, fd int, keys record.Secrets, cfg relay.TrunkConfig) *relay.Trunk {
	r.t.Helper()
	layer, err := record.New(keys)
	if err != nil {
		r.t.Fatal(err)
	}
	var t *relay.Trunk
	on(w, func() {
		t, err = w.NewTrunk(fd, session.New(layer, h2.New(h2.Config{Client: keys.Client}), nil), &owner{r: r, w: w, side: side}, cfg)
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return t
}

// on runs f on the worker's thread and waits for it.
func on(w *relay.Worker, f func()) {
	done := make(chan struct{})
	if w.Loop.Post(func() { defer close(done); f() }) {
		<-done
	}
}

// hold stops the worker's loop until the returned function is called.
func hold(w *relay.Worker) (release func()) {
	held, let := make(chan struct{}), make(chan struct{})
	w.Loop.Post(func() { close(held); <-let })
	<-held
	return sync.OnceFunc(func() { close(let) })
}

// pair is a TCP connection as descriptors.
func pair(t testing.TB) (int, int) {
	t.Helper()
	a, b := testtcp.Pair(t)
	return raw(t, a), raw(t, b)
}

func raw(t testing.TB, c net.Conn) int {
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

func netConn(t testing.TB, fd int) *net.TCPConn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "app")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// appPair is an application's connection: our end of it, and its own.
func (r *rig) appPair(buffers int) (int, *net.TCPConn) {
	r.t.Helper()
	a, b := pair(r.t)
	if n := buffers; n > 0 {
		for _, fd := range []int{a, b} {
			for plain, force := range map[int]int{unix.SO_SNDBUF: unix.SO_SNDBUFFORCE, unix.SO_RCVBUF: unix.SO_RCVBUFFORCE} {
				// As root also beyond net.core's maximum.
				if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, n) != nil {
					_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, n)
				}
			}
		}
	}
	c := netConn(r.t, b)
	if _, bench := r.t.(*testing.B); !bench {
		_ = c.SetDeadline(time.Now().Add(patience))
	}
	return a, c
}

// owner owns trunks; it answers requests by making an application.
type owner struct {
	r    *rig
	w    *relay.Worker
	side string
}

func (o *owner) Established(*relay.Trunk) {}

func (o *owner) Closed(_ *relay.Trunk, err error) { o.r.closed <- closed{o.side, err} }

func (o *owner) Request(t *relay.Trunk, st *h2.Stream, fields []hpack.HeaderField) {
	if st.Closed() && o.r.cfg.serve != nil { // before it was taken up
		a, app := o.r.appPair(0)
		o.r.apps.Go(func() { defer app.Close(); o.r.cfg.serve(app, "") })
		_ = unix.SetsockoptLinger(a, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		unix.Close(a)
		(&party{r: o.r, side: "server"}).Closed(new(relay.Relay), relay.EndPeerReset, "")
		return
	}
	serve := func() *relay.Relay {
		authority := ""
		for _, f := range fields {
			if f.Name == ":authority" {
				authority = f.Value
			}
		}
		var a int
		var app net.Conn
		if o.r.cfg.clog != nil && o.r.cfg.clog(authority) {
			a, app = full(o.r.t)
		} else {
			a, app = o.r.appPair(o.r.cfg.farBuffers)
		}
		r, err := o.w.Connecting(a, &party{r: o.r, side: "server", st: st})
		if err != nil {
			o.r.t.Error(err)
			app.Close()
			return nil
		}
		o.r.apps.Go(func() { defer app.Close(); o.r.cfg.serve(app, authority) })
		r.Attach(t, st)
		return r
	}
	if o.r.cfg.request != nil {
		o.r.cfg.request(o.w, t, st, serve)
		return
	}
	if r := serve(); r != nil {
		r.Established()
	}
}

// full is a pair of sockets of which the first takes nothing. They are no TCP
// sockets: those go on taking a little when they are full.
func full(t testing.TB) (int, net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{64 << 10, 1} {
		for p := make([]byte, n); err == nil; {
			_, err = unix.Write(fds[0], p)
		}
		err = nil
	}
	f := os.NewFile(uintptr(fds[1]), "app")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return fds[0], c
}

// party owns a relay.
type party struct {
	r    *rig
	side string
	st   *h2.Stream
}

func (p *party) Connected(r *relay.Relay, err error) {
	if err == nil {
		err = r.Trunk().Session().H2.Respond(p.st, []hpack.HeaderField{{Name: ":status", Value: "200"}}, false)
	}
	if err != nil {
		r.Abort(http2.ErrCodeInternal, err.Error())
		return
	}
	r.Trunk().Send()
	r.Open()
}

func (p *party) Response(r *relay.Relay, fields []hpack.HeaderField) {
	if fields[0].Value != "200" {
		r.Abort(http2.ErrCodeCancel, "status "+fields[0].Value)
		return
	}
	r.Open()
}

func (p *party) Refused(r *relay.Relay) {
	if p.r.cfg.refused != nil {
		p.r.cfg.refused(r)
		return
	}
	r.Abort(http2.ErrCodeCancel, "refused")
}

func (p *party) Closed(r *relay.Relay, how relay.End, detail string) {
	e := end{p.side, how, detail, r.Sent(), r.Received()}
	if p.r.cfg.ended != nil {
		p.r.cfg.ended(e)
		return
	}
	p.r.ends <- e
}

func request(authority string) []hpack.HeaderField {
	return []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: authority}}
}

// open gives our end of an application's connection to the client's trunk.
func (r *rig) open(fd int) (*relay.Relay, error) {
	var rl *relay.Relay
	err := h2.ErrGoingAway // where the loop has stopped
	on(r.client, func() {
		if rl, err = r.client.Waiting(fd, &party{r: r, side: "client"}); err == nil {
			err = r.trunk.Open(rl, request("10.0.0.1:80"))
		}
	})
	return rl, err
}

// dial is what an application does: it gets a connection through the tunnel.
func (r *rig) dial() *net.TCPConn {
	r.t.Helper()
	a, c := r.appPair(r.cfg.buffers)
	if _, err := r.open(a); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// end waits for the next relay to end.
func (r *rig) end() end {
	r.t.Helper()
	select {
	case e := <-r.ends:
		return e
	case <-time.After(patience):
		r.t.Fatal("a relay has not ended")
		panic("unreachable")
	}
}

// bothEnds waits for the two relays of one connection to end.
func (r *rig) bothEnds() (client, server end) {
	r.t.Helper()
	client, server = r.end(), r.end()
	if client.side != "client" {
		client, server = server, client
	}
	if client.side == server.side {
		r.t.Fatalf("two ends of one side: %+v, %+v", client, server)
	}
	return client, server
}

// trunkEnd waits for the next trunk to end.
func (r *rig) trunkEnd() closed {
	r.t.Helper()
	select {
	case c := <-r.closed:
		return c
	case <-time.After(patience):
		r.t.Fatal("a tunnel connection has not ended")
		panic("unreachable")
	}
}

func receive[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("nothing came: %s", what)
		panic("unreachable")
	}
}
