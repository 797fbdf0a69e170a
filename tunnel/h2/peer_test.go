// SPDX-License-Identifier: Apache-2.0

//lint:file-ignore SA1019 It is x/net's own client and server that we talk to here, not net/http's.

package h2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/internal/testtcp"
)

// endpoint runs a Conn on a socket, for tests: a goroutine reads, another
// writes. Everything about the Conn is under mu.
type endpoint struct {
	nc     net.Conn
	sizes  *rand.Rand // of reads
	rng    *rand.Rand // under mu
	freeze bool       // now and then
	on     func(Event)
	pull   func() // lays down data, by send

	mu   sync.Mutex
	c    *Conn
	out  []byte
	wake sync.Cond
	err  error
	done bool
	wg   sync.WaitGroup
}

func start(nc net.Conn, cfg Config, seed uint64, freeze bool) *endpoint {
	e := &endpoint{nc: nc, c: New(cfg), sizes: rand.New(rand.NewPCG(seed, 1)), rng: rand.New(rand.NewPCG(seed, 2)), freeze: freeze}
	e.wake.L = &e.mu
	return e
}

func (e *endpoint) run() {
	e.wg.Go(e.read)
	e.wg.Go(e.write)
}

// stop closes the socket and waits.
func (e *endpoint) stop() {
	e.nc.Close()
	e.mu.Lock()
	e.done = true
	e.wake.Broadcast()
	e.mu.Unlock()
	e.wg.Wait()
}

func (e *endpoint) read() {
	buf := make([]byte, 40<<10)
	for {
		n, err := e.nc.Read(buf[:1+e.sizes.IntN(len(buf))])
		e.mu.Lock()
		if n > 0 && e.err == nil {
			events, rerr := e.c.Receive(buf[:n])
			for _, ev := range events {
				e.on(ev)
			}
			e.err = rerr
			if e.freeze && rerr == nil && e.rng.IntN(4) == 0 {
				e.move()
			}
			e.pull()
		}
		e.wake.Broadcast()
		e.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (e *endpoint) write() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for !e.done {
		c := e.c.Control()
		e.out = append(e.out, c...)
		e.c.ConsumeControl(len(c))
		if len(e.out) == 0 {
			e.wake.Wait()
			continue
		}
		out := e.out
		e.out = nil
		e.mu.Unlock()
		_, err := e.nc.Write(out)
		e.mu.Lock()
		if err != nil {
			return
		}
		e.pull()
	}
}

// send lays down a DATA frame behind what is in Control.
func (e *endpoint) send(s *Stream, p []byte, end bool) {
	c := e.c.Control()
	e.out = append(e.out, c...)
	e.c.ConsumeControl(len(c))
	e.out = append(e.out, frameData(e.c, s, p, end)...)
}

// move freezes the connection and thaws it.
func (e *endpoint) move() {
	user := map[uint32]any{}
	for id, s := range e.c.streams {
		user[id] = s.User
	}
	var b bytes.Buffer
	var st State
	must(gob.NewEncoder(&b).Encode(e.c.Freeze()))
	must(gob.NewDecoder(&b).Decode(&st))
	c, streams := Thaw(st)
	for _, s := range streams {
		s.User = user[s.ID()]
		if a, ok := s.User.(*app); ok {
			a.s = s
		}
	}
	e.c = c
}

// app is what stands behind a stream of an endpoint.
type app struct {
	s       *Stream
	src     io.Reader // what it sends; nil: what it received
	sum     []byte    // of what it received, when it ended
	hash    interface{ Sum([]byte) []byte }
	in      io.Writer
	buf     []byte // read of src, not sent
	eof     bool
	fin     bool
	ended   bool
	drop    int // bytes taken since the window was last changed
	status  string
	failure string
	over    chan struct{}
}

func newApp(src io.Reader) *app {
	h := sha256.New()
	return &app{src: src, hash: h, in: h, over: make(chan struct{})}
}

func (a *app) finish(failure string) {
	select {
	case <-a.over:
	default:
		a.failure = failure
		a.sum = a.hash.Sum(nil)
		close(a.over)
	}
}

// received handles an event of an app's stream.
func (e *endpoint) received(a *app, ev Event) {
	switch ev.Kind {
	case EventData:
		_, _ = a.in.Write(ev.Data)
		a.s.Enqueue(ev.Data)
		if a.src != nil {
			e.took(a, len(ev.Data))
		}
	case EventEnd:
		a.fin = true
	case EventReset:
		if a.fin && ev.Code == http2.ErrCodeNo {
			a.finish(a.status) // a whole answer, and no wish for the rest of the request
			return
		}
		a.finish(fmt.Sprint("reset ", ev.Code, ev.Local))
	}
}

func (e *endpoint) took(a *app, n int) {
	a.s.Dequeue(n)
	if a.drop += n; a.drop > 50<<10 { // grow and shrink
		a.drop = 0
		e.c.SetWindow(a.s, 30<<10+e.rng.IntN(200<<10))
	}
	e.c.Taken(a.s, n)
}

// pump sends what an app has to send and the windows let through.
func (e *endpoint) pump(a *app) {
	for !a.ended && len(e.out) < 256<<10 {
		n := min(a.s.Sendable(), 1+e.rng.IntN(16384))
		var p []byte
		switch {
		case a.src == nil: // echo
			if a.s.QueuedBytes() == 0 && a.fin {
				e.c.End(a.s)
				a.ended = true
				continue
			}
			if n = min(n, a.s.QueuedBytes()); n == 0 {
				return
			}
			p = bytes.Join(a.s.Queued(), nil)[:n]
			e.send(a.s, p, false)
			e.took(a, n)
		default:
			if len(a.buf) == 0 && !a.eof {
				a.buf = make([]byte, 16384)
				k, err := a.src.Read(a.buf)
				a.buf = a.buf[:k]
				a.eof = err != nil
			}
			if len(a.buf) == 0 && a.eof {
				e.send(a.s, nil, true)
				a.ended = true
				continue
			}
			if n == 0 {
				return
			}
			n = min(n, len(a.buf))
			e.send(a.s, a.buf[:n], false)
			a.buf = a.buf[n:]
		}
	}
	if a.ended && a.fin && a.s.QueuedBytes() == 0 {
		a.finish("")
	}
}

// noise is n bytes that are the same for each seed.
func noise(seed uint64, n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), n)
}

func sumOf(r io.Reader) []byte {
	h := sha256.New()
	_, _ = io.Copy(h, r)
	return h.Sum(nil)
}

func seeded(t *testing.T) uint64 {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return seed
}

const (
	peerStreams = 12
	peerBytes   = 1 << 20 // of the largest stream
)

// x/net's client opens streams to an echoing server of ours.
func TestClientOfXNet(t *testing.T) {
	for _, freeze := range []bool{false, true} {
		t.Run(fmt.Sprintf("freeze=%v", freeze), func(t *testing.T) {
			ours, theirs := testtcp.Pair(t)
			e := start(ours, Config{MaxConcurrentStreams: 20}, seeded(t), freeze)
			apps := map[uint32]*app{}
			e.on = func(ev Event) {
				if ev.Kind == EventHeaders {
					a := newApp(nil)
					a.s, ev.Stream.User = ev.Stream, a
					apps[ev.Stream.ID()] = a
					must(e.c.Respond(ev.Stream, []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "echo", Value: ev.Headers[0].Value}}, false))
					return
				}
				if ev.Stream != nil {
					e.received(apps[ev.Stream.ID()], ev)
				}
			}
			e.pull = func() {
				for _, a := range apps {
					e.pump(a)
				}
			}
			e.run()
			defer e.stop()
			cc, err := (&http2.Transport{}).NewClientConn(theirs)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			var wg sync.WaitGroup
			for i := range uint64(peerStreams) {
				wg.Go(func() {
					size := int64(i) * peerBytes / peerStreams
					req := (&http.Request{
						Method: http.MethodConnect, Host: "10.0.0.1:80", URL: &url.URL{Host: "10.0.0.1:80"},
						Header: http.Header{"Baggage": {"k8s.pod.name=x"}}, Body: io.NopCloser(noise(i, size)), ContentLength: -1,
					}).WithContext(ctx)
					res, err := cc.RoundTrip(req)
					if err != nil {
						t.Errorf("stream of %d bytes: %v", size, err)
						return
					}
					defer res.Body.Close()
					if res.StatusCode != 200 || res.Header.Get("Echo") == "" {
						t.Errorf("answer %v", res)
					}
					if got := sumOf(res.Body); !bytes.Equal(got, sumOf(noise(i, size))) {
						t.Errorf("stream of %d bytes comes back different", size)
					}
				})
			}
			wg.Wait()
			// A reset of theirs ends the stream, not the connection.
			reset, stop := context.WithCancel(ctx)
			pr, pw := io.Pipe()
			res, err := cc.RoundTrip((&http.Request{Method: http.MethodConnect, Host: "h:1", URL: &url.URL{Host: "h:1"}, Body: pr, ContentLength: -1}).WithContext(reset))
			if err != nil {
				t.Fatal(err)
			}
			stop()
			pw.Close()
			res.Body.Close()
			for {
				if err := cc.Ping(ctx); err != nil { // the deadline is in ctx
					t.Fatal(err)
				}
				e.mu.Lock()
				err, left := e.err, e.c.CountStreams()
				e.mu.Unlock()
				if err != nil {
					t.Fatal(err)
				}
				if left == 0 {
					return
				}
			}
		})
	}
}

// Our client opens streams to an echoing server of x/net's.
func TestServerOfXNet(t *testing.T) {
	for _, freeze := range []bool{false, true} {
		t.Run(fmt.Sprintf("freeze=%v", freeze), func(t *testing.T) {
			ours, theirs := testtcp.Pair(t)
			served := make(chan struct{})
			go func() {
				defer close(served)
				(&http2.Server{MaxConcurrentStreams: peerStreams, MaxReadFrameSize: 1 << 20}).ServeConn(theirs, &http2.ServeConnOpts{
					Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						if r.Host == "10.0.0.1:1" {
							w.WriteHeader(503)
							return
						}
						w.WriteHeader(200)
						_ = http.NewResponseController(w).Flush()
						buf := make([]byte, 10000)
						for {
							n, err := r.Body.Read(buf)
							if _, werr := w.Write(buf[:n]); werr != nil {
								return
							}
							_ = http.NewResponseController(w).Flush()
							if err != nil {
								return
							}
						}
					}),
				})
			}()
			e := start(ours, Config{Client: true}, seeded(t), freeze)
			var apps []*app
			settled := make(chan struct{})
			e.on = func(ev Event) {
				if ev.Kind == EventSettings {
					close(settled)
				}
				if ev.Stream == nil {
					return
				}
				a := ev.Stream.User.(*app)
				if ev.Kind == EventHeaders {
					a.status = ev.Headers[0].Value
					return
				}
				e.received(a, ev)
			}
			e.pull = func() {
				for _, a := range apps {
					if a.status == "200" {
						e.pump(a)
					} else if a.status != "" && a.fin {
						a.finish(a.status)
					}
				}
			}
			e.run()
			<-settled
			open := func(authority string, src io.Reader) *app {
				e.mu.Lock()
				defer e.mu.Unlock()
				f := connectFields()
				f[1].Value = authority
				a := newApp(src)
				s, err := e.c.Open(f, a)
				if err != nil {
					t.Fatal(err)
				}
				a.s = s
				apps = append(apps, a)
				e.wake.Broadcast()
				return a
			}
			wait := func(a *app) {
				t.Helper()
				select {
				case <-a.over:
				case <-time.After(30 * time.Second):
					e.mu.Lock()
					defer e.mu.Unlock()
					t.Fatalf("stream %d hangs: %+v, connection %v", a.s.id, a.s, e.err)
				}
			}
			for i := range uint64(peerStreams) {
				open("10.0.0.1:80", noise(i, int64(i)*peerBytes/peerStreams))
			}
			e.mu.Lock()
			if e.c.opened == peerStreams { // the shortest may have ended
				if _, err := e.c.Open(connectFields(), nil); !errors.Is(err, ErrStreamLimit) {
					t.Errorf("one stream more: %v", err)
				}
			}
			e.mu.Unlock()
			for i, a := range apps {
				wait(a)
				if want := sumOf(noise(uint64(i), int64(i)*peerBytes/peerStreams)); a.failure != "" || !bytes.Equal(a.sum, want) {
					t.Errorf("stream %d: %s, same bytes %v", a.s.id, a.failure, bytes.Equal(a.sum, want))
				}
			}
			refused := open("10.0.0.1:1", nil)
			wait(refused)
			if refused.failure != "503" {
				t.Errorf("refusal: %q", refused.failure)
			}
			e.mu.Lock()
			if e.err != nil {
				t.Error(e.err)
			}
			e.mu.Unlock()
			e.stop()
			<-served
		})
	}
}
