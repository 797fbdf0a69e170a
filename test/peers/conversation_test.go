// SPDX-License-Identifier: Apache-2.0

package peers

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// way leads from a client through a foreign peer and our daemon, in the one or in
// the other order, to an application.
type way struct {
	direction string // that our daemon logs: outbound where ours is the client
	dial      func(e *env, family int) (*net.TCPConn, error)
	app       *application
	// endsBoth says that the peer cannot keep the client's half open when the
	// server has ended its own. What of the server's half it has not sent by then
	// it may drop, with a reset.
	endsBoth bool
	// endsCleanly says that a client's reset is an end for the server.
	endsCleanly bool
	// hidesResets says that the peer makes an end of every reset, of its
	// application's as of ours.
	hidesResets bool
	// losesEnd says that a session which drains may be closed by the peer before
	// the end of its last stream is out: a truncation, and so a reset.
	losesEnd bool
}

// application listens on both families and does what the test at hand says.
type application struct {
	*lab.App
	handle atomic.Pointer[func(*net.TCPConn)]
}

func serve(e *env, p *lab.Pod) *application {
	e.t.Helper()
	a := new(application)
	app, err := p.Serve(appPort, func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Now().Add(6 * patience()))
		if f := a.handle.Load(); f != nil {
			(*f)(c)
		}
	})
	e.must(err)
	a.App = app
	return a
}

// is sets what the application does.
func (a *application) is(f func(*net.TCPConn)) { a.handle.Store(&f) }

func echo(c *net.TCPConn) {
	if _, err := io.Copy(c, c); err == nil {
		_ = c.CloseWrite()
	}
}

// connect is dial that has to succeed.
func (w *way) connect(e *env, family int) *net.TCPConn {
	e.t.Helper()
	c, err := w.dial(e, family)
	e.must(err)
	return c
}

// carries wants an exchange to go through.
func (w *way) carries(e *env, family int) {
	e.t.Helper()
	w.app.is(echo)
	c := w.connect(e, family)
	e.must(lab.Exchange(c, "carried"))
	_ = c.Close()
}

// converse is what each peer is asked to carry, in both roles.
func (w *way) converse(e *env) {
	// A GiB each way, each over another family; the other family has less.
	e.t.Run("Bulk", func(t *testing.T) {
		for _, up := range []bool{true, false} {
			t.Run(map[bool]string{true: "up", false: "down"}[up], func(t *testing.T) {
				families(e.in(t), func(e *env, family int) {
					size := int64(16 << 20)
					if up == (family == 4) {
						size = 1 << 30
					}
					w.bulk(e, family, up, size)
				})
			})
		}
	})
	e.t.Run("Streams", func(t *testing.T) { families(e.in(t), w.streams) })
	e.t.Run("HalfClose", func(t *testing.T) {
		t.Run("client", func(t *testing.T) { families(e.in(t), w.halfCloseByClient) })
		t.Run("server", func(t *testing.T) { families(e.in(t), w.halfCloseByServer) })
	})
	e.t.Run("Reset", func(t *testing.T) {
		t.Run("client", func(t *testing.T) { families(e.in(t), w.resetByClient) })
		t.Run("server", func(t *testing.T) { families(e.in(t), w.resetByServer) })
	})
}

// bulk carries bytes one way and compares their digests, and what our log counts.
func (w *way) bulk(e *env, family int, up bool, size int64) {
	e.t.Helper()
	run := func(size, flip int64) (sent, got digest) {
		ends := make(chan digest, 1)
		w.app.is(func(c *net.TCPConn) {
			if up {
				ends <- receive(c)
				return
			}
			_, _ = io.ReadFull(c, make([]byte, 1))
			d := send(c, size, flip)
			if !w.endsBoth {
				_ = c.CloseWrite()
			}
			ends <- d
			_, _ = io.Copy(io.Discard, c)
		})
		c := w.connect(e, family)
		defer c.Close()
		if up {
			sent = send(c, size, flip)
			e.must(c.CloseWrite())
			_, _ = io.Copy(io.Discard, c)
			return sent, <-ends
		}
		_, err := io.WriteString(c, "!")
		e.must(err)
		if w.endsBoth { // the client has to end first
			got = receive(io.LimitReader(c, size))
			e.must(c.CloseWrite())
			if n, err := io.Copy(io.Discard, c); n != 0 || err != nil {
				e.t.Errorf("%d bytes more and %v", n, err)
			}
			return <-ends, got
		}
		got = receive(c)
		e.must(c.CloseWrite())
		return <-ends, got
	}
	watch := w.watch(e)
	start := time.Now()
	sent, got := run(size, -1)
	took := time.Since(start)
	if err := errors.Join(sent.err, got.err); err != nil || sent.sum != got.sum || got.n != size {
		e.t.Errorf("%d bytes came of %d, digests equal: %v, error %v", got.n, sent.n, sent.sum == got.sum, err)
	}
	e.t.Logf("%d MiB in %v: %.2f Gbit/s", size>>20, took.Round(time.Millisecond), float64(size)*8/1e9/took.Seconds())
	field, l := "bytes_recv", watch.closed(e, w.app.Addr(family))
	if !up {
		field = "bytes_sent"
	}
	if l.String(field) != strconv.FormatInt(size, 10) || l.String("reason") != "ok" {
		e.t.Errorf("access log: %s is %s, reason %q (%s), want %d and ok", field, l.String(field), l.String("reason"), l.String("detail"), size)
	}
	// The control: the digest sees one byte that was changed on the way.
	if sent, got := run(1<<20, 700_000); sent.sum == got.sum || got.n != 1<<20 {
		e.t.Errorf("control: the digest does not see a changed byte (%d bytes came)", got.n)
	}
}

// digest is what an end has of a bulk transfer.
type digest struct {
	n   int64
	sum [sha256.Size]byte
	err error
}

// send writes bytes of which no two blocks are the same. The byte at flip, if
// that is not negative, is another on the wire than in the digest.
func send(w io.Writer, size, flip int64) (d digest) {
	block := make([]byte, 256<<10)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(block)
	h := sha256.New()
	for d.n < size && d.err == nil {
		binary.BigEndian.PutUint64(block, uint64(d.n))
		b := block[:min(int64(len(block)), size-d.n)]
		h.Write(b)
		changed := flip >= d.n && flip < d.n+int64(len(b))
		if changed {
			b[flip-d.n] ^= 1
		}
		var n int
		n, d.err = w.Write(b)
		if changed {
			b[flip-d.n] ^= 1
		}
		d.n += int64(n)
	}
	h.Sum(d.sum[:0])
	return d
}

func receive(r io.Reader) (d digest) {
	h := sha256.New()
	d.n, d.err = io.CopyBuffer(h, r, make([]byte, 256<<10))
	h.Sum(d.sum[:0])
	return d
}

// streams holds 500 connections at once and uses each twice.
func (w *way) streams(e *env, family int) {
	const n = 500
	w.app.is(echo)
	before := e.handshakes()
	conns := make([]net.Conn, n)
	each := func(f func(i int) error) {
		e.t.Helper()
		var all sync.WaitGroup
		errs := make([]error, n)
		for i := range n {
			all.Go(func() { errs[i] = f(i) })
		}
		all.Wait()
		failed := 0
		for _, err := range errs {
			if err != nil {
				failed++
			}
		}
		if failed > 0 {
			e.t.Fatalf("%d of %d failed, the first with: %v", failed, n, errors.Join(errs...))
		}
	}
	each(func(i int) error {
		c, err := w.dial(e, family)
		if err != nil {
			return err
		}
		conns[i] = c
		return lab.Exchange(c, fmt.Sprintf("first of %d", i))
	})
	each(func(i int) error { return lab.Exchange(conns[i], fmt.Sprintf("second of %d", i)) })
	handshakes := e.handshakes() - before
	e.t.Logf("%d streams at once, %v new sessions", n, handshakes)
	if handshakes > 8 { // the most that a pair of pods has
		e.t.Errorf("%v handshakes for %d streams: they are not on sessions that they share", handshakes, n)
	}
	for _, c := range conns {
		_ = c.Close()
	}
}

// halfCloseByClient: the client has said all, the server speaks after that.
func (w *way) halfCloseByClient(e *env, family int) {
	got := make(chan string, 1)
	w.app.is(func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		got <- string(b)
		_, _ = io.WriteString(c, "from the server")
	})
	watch := w.watch(e)
	c := w.connect(e, family)
	_, err := io.WriteString(c, "from the client")
	e.must(err)
	e.must(c.CloseWrite())
	b, err := io.ReadAll(c)
	if err != nil || string(b) != "from the server" {
		e.t.Errorf("the client got %q, %v, after its half-close", b, err)
	}
	if g := <-got; g != "from the client" {
		e.t.Errorf("the server got %q", g)
	}
	watch.ended(e, w.app.Addr(family), "ok")
}

// halfCloseByServer: the other way around.
func (w *way) halfCloseByServer(e *env, family int) {
	got := make(chan string, 1)
	w.app.is(func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "from the server")
		_ = c.CloseWrite()
		b, err := io.ReadAll(c)
		got <- fmt.Sprint(string(b), err)
	})
	watch := w.watch(e)
	c := w.connect(e, family)
	b, err := io.ReadAll(c)
	if err != nil || string(b) != "from the server" {
		e.t.Errorf("the client got %q, %v", b, err)
	}
	if w.endsBoth {
		// What the server said has come whole, and what the client says yet
		// is nobody's.
		if g := <-got; g != "<nil>" {
			e.t.Errorf("the server got %q after its half-close", g)
		}
		watch.ended(e, w.app.Addr(family), "ok")
		return
	}
	_, err = io.WriteString(c, "from the client")
	e.must(err)
	e.must(c.CloseWrite())
	if g := <-got; g != "from the client<nil>" {
		e.t.Errorf("the server got %q after its half-close", g)
	}
	watch.ended(e, w.app.Addr(family), "ok")
}

// resetByClient: a client that goes away is a reset for the server.
func (w *way) resetByClient(e *env, family int) {
	ends := make(chan error, 1)
	w.app.is(func(c *net.TCPConn) {
		_, _ = io.CopyN(c, c, 1)
		_, err := io.ReadAll(c)
		ends <- err
	})
	watch := w.watch(e)
	c := w.connect(e, family)
	e.must(lab.Exchange(c, "x"))
	e.must(c.SetLinger(0))
	_ = c.Close()
	if err := <-ends; lab.IsReset(err) == (w.endsCleanly || w.hidesResets) {
		e.t.Errorf("the server saw %v, want a reset: %v", err, !w.endsCleanly && !w.hidesResets)
	}
	watch.ended(e, w.app.Addr(family), w.reset("outbound"))
}

// resetByServer: a server that goes away is a reset for the client.
func (w *way) resetByServer(e *env, family int) {
	w.app.is(func(c *net.TCPConn) {
		_, _ = io.CopyN(c, c, 1)
		// What it said has arrived: libuv, under Node.js, takes data with a
		// reset behind it for an end.
		_, _ = io.ReadFull(c, make([]byte, 1))
		_ = c.SetLinger(0) // and is closed
	})
	watch := w.watch(e)
	c := w.connect(e, family)
	e.must(lab.Exchange(c, "x"))
	_, err := io.WriteString(c, "y")
	e.must(err)
	if _, err := io.ReadAll(c); lab.IsReset(err) == w.hidesResets {
		e.t.Errorf("the client saw %v, want a reset: %v", err, !w.hidesResets)
	}
	_ = c.Close()
	watch.ended(e, w.app.Addr(family), w.reset("inbound"))
}

// reset is the reason that we log for a reset of an application, which is ours
// where we are what direction says.
func (w *way) reset(direction string) string {
	if w.hidesResets && w.direction != direction {
		return "ok"
	}
	return "reset"
}

// goesOn has a connection open on a session, another beside it, has the session
// take nothing new any more, and wants a third to go to another session while the
// first goes on. What is returned ends the first, and wants a good end of it.
func (w *way) goesOn(e *env, family int, drain func()) (end func()) {
	e.t.Helper()
	w.app.is(echo)
	c1 := w.connect(e, family)
	e.must(lab.Exchange(c1, "one"))
	sessions := e.handshakes()
	c2 := w.connect(e, family)
	e.must(lab.Exchange(c2, "two"))
	if n := e.handshakes() - sessions; n != 0 { // the control
		e.t.Errorf("control: the second connection made %v sessions", n)
	}
	_ = c2.Close()
	drain()
	c3 := w.connect(e, family)
	e.must(lab.Exchange(c3, "three"))
	if n := e.handshakes() - sessions; n != 1 {
		e.t.Errorf("%v new sessions after the GOAWAY, want 1", n)
	}
	e.must(lab.Exchange(c1, "four"))
	return func() {
		e.t.Helper()
		e.must(c1.CloseWrite())
		if b, err := io.ReadAll(c1); len(b) != 0 || err != nil && !(w.losesEnd && lab.IsReset(err)) {
			e.t.Errorf("the first connection ended with %q, %v", b, err)
		}
		e.must(lab.Exchange(c3, "five"))
		_ = c3.Close()
	}
}

// untilAnother has our client make connections until one needs another session
// than those that there are: it has heard, or said, GOAWAY by then.
func (w *way) untilAnother(e *env, family int) {
	e.t.Helper()
	before := e.handshakes()
	e.must(lab.Until(e.ctx, "our client makes another session", func() error {
		w.carries(e, family)
		if e.handshakes() == before {
			return errors.New("it uses the one that it has")
		}
		return nil
	}, lab.Within(patience())))
}

// watch holds what our daemon logs from now on.
type watch struct {
	*lab.Watch
	direction string
}

func (w *way) watch(e *env) *watch { return e.watch(w.direction) }

func (e *env) watch(direction string) *watch {
	e.t.Helper()
	w, err := e.daemon.Watch()
	e.must(err)
	return &watch{w, direction}
}

// closed waits for the line of the access log of a connection.
func (w *watch) closed(e *env, dst netip.AddrPort) lab.Entry {
	e.t.Helper()
	l, err := w.Closed(e.ctx, w.direction, dst, lab.Within(patience()))
	e.must(err)
	return l
}

// ended wants the connection's reason, and returns its line.
func (w *watch) ended(e *env, dst netip.AddrPort, reason string) lab.Entry {
	e.t.Helper()
	l := w.closed(e, dst)
	if got := l.String("reason"); got != reason {
		e.t.Errorf("access log: reason %q (%s), want %q", got, l.String("detail"), reason)
	}
	return l
}

// refused waits for the line of a failed handshake, and wants words in it.
func (w *watch) refused(e *env, words ...string) {
	e.t.Helper()
	line, err := w.HandshakeFailed(e.ctx, lab.Within(patience()))
	e.must(err)
	for _, word := range words {
		if !strings.Contains(line, word) {
			e.t.Errorf("our log says %q, want %q in it", line, word)
		}
	}
}

// handshakes is how many of our daemon's have succeeded.
func (e *env) handshakes() float64 {
	e.t.Helper()
	m, err := e.daemon.Metrics(e.ctx)
	e.must(err)
	return m.Sum("mtls_handshake_success_total")
}
