// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/lab"
)

func TestHalfClose(t *testing.T) {
	for _, half := range []string{"client", "server"} {
		t.Run(half, func(t *testing.T) {
			families(t, func(t *testing.T, family int) {
				e, d := mesh(t)
				got := make(chan string, 1)
				app, err := e.Pod(2, 1).Serve(8080, func(c *net.TCPConn) {
					if half == "server" { // says its piece, then listens
						io.WriteString(c, "from the server")
						c.CloseWrite()
						b, _ := io.ReadAll(c)
						got <- string(b)
						return
					}
					b, _ := io.ReadAll(c)
					got <- string(b)
					io.WriteString(c, "from the server")
				})
				e.must(err)
				c := e.connect(e.Pod(1, 1), app.Addr(family))
				if half == "server" {
					b, err := io.ReadAll(c) // its FIN has come
					e.must(err)
					if string(b) != "from the server" {
						t.Errorf("client got %q", b)
					}
					_, err = io.WriteString(c, "from the client")
					e.must(err)
					e.must(c.CloseWrite())
				} else {
					_, err := io.WriteString(c, "from the client")
					e.must(err)
					e.must(c.CloseWrite())
					b, err := io.ReadAll(c)
					e.must(err)
					if string(b) != "from the server" {
						t.Errorf("client got %q after its half-close", b)
					}
				}
				if g := <-got; g != "from the client" {
					t.Errorf("server got %q", g)
				}
				for i, direction := range []string{"outbound", "inbound"} {
					if r := e.line(d[i], direction, app.Addr(family)).String("reason"); r != "ok" {
						t.Errorf("%s: reason %q, want ok", direction, r)
					}
				}
			})
		})
	}
}

func TestReset(t *testing.T) {
	for _, who := range []string{"client", "server"} {
		t.Run(who, func(t *testing.T) {
			families(t, func(t *testing.T, family int) {
				e, d := mesh(t)
				ended := make(chan error, 1)
				app, err := e.Pod(2, 1).Serve(8080, func(c *net.TCPConn) {
					b := make([]byte, 1)
					io.ReadFull(c, b)
					if who == "server" {
						c.SetLinger(0)
						return // closed by the caller: a reset
					}
					io.WriteString(c, "x")
					_, err := io.ReadAll(c)
					ended <- err
				})
				e.must(err)
				c := e.connect(e.Pod(1, 1), app.Addr(family))
				_, err = io.WriteString(c, "x")
				e.must(err)
				if who == "server" {
					_, err := io.ReadAll(c)
					ended <- err
				} else {
					_, err := io.ReadFull(c, make([]byte, 1))
					e.must(err)
					e.must(c.SetLinger(0))
					c.Close()
				}
				if err := <-ended; !isReset(err) {
					t.Errorf("the other side saw %v, want a reset", err)
				}
				for i, direction := range []string{"outbound", "inbound"} {
					if r := e.line(d[i], direction, app.Addr(family)).String("reason"); r != "reset" {
						t.Errorf("%s: reason %q, want reset", direction, r)
					}
				}
			})
		})
	}
}

func TestClosedPort(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		e.must(exchange(e.connect(e.Pod(1, 1), app.Addr(family)), "warm")) // so that no handshake is measured
		addr := app.Addr(family)
		e.must(app.Close())
		server := e.capture(capture.Config{NS: e.Pod(2, 1).NS, Interface: "eth0"})
		start := time.Now()
		c, err := e.dial(e.Pod(1, 1), addr)
		if err == nil {
			_, err = io.WriteString(c, "x")
			if err == nil {
				_, err = c.Read(make([]byte, 1))
			}
		}
		if took := time.Since(start); took > atOnce() {
			t.Errorf("the answer took %v, want %v at most", took, atOnce())
		}
		if !isReset(err) && !isRefused(err) {
			t.Errorf("the client saw %v, want a reset", err)
		}
		if n, _ := server.Count(func(s capture.Segment) bool { return !s.Port(hbonePort) }); n != 0 {
			t.Errorf("%d segments of the refused delivery left by eth0", n)
		}
		if r := e.line(d[0], "outbound", addr); r.String("reason") == "ok" {
			e.lines(d[0], 2, "outbound", addr)
		}
		for i, direction := range []string{"outbound", "inbound"} {
			lines := e.lines(d[i], 1, direction, addr)
			if r := lines[len(lines)-1].String("reason"); r != "refused" {
				t.Errorf("%s: reason %q, want refused", direction, r)
			}
		}
	})
}

func TestStuckReader(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, _ := mesh(t)
		release := make(chan struct{})
		stuck, err := e.Pod(2, 1).Serve(8081, func(c *net.TCPConn) { <-release; io.Copy(io.Discard, c) })
		e.must(err)
		app, err := e.Pod(2, 1).Echo(8080)
		e.must(err)
		s := e.connect(e.Pod(1, 1), stuck.Addr(family))
		wrote := make(chan int64, 1)
		go func() {
			n, _ := io.Copy(s, io.LimitReader(zeros{}, 64<<20))
			wrote <- n
		}()
		var all sync.WaitGroup
		errs := make(chan error, 99)
		payload := string(bytes.Repeat([]byte("0123456789abcdef"), 4096)) // 64 KiB
		for range 99 {
			all.Go(func() {
				c, err := e.dial(e.Pod(1, 1), app.Addr(family))
				for i := 0; i < 5 && err == nil; i++ {
					err = exchange(c, payload)
				}
				errs <- err
			})
		}
		all.Wait()
		for range 99 {
			if err := <-errs; err != nil {
				t.Errorf("a sibling of the stuck stream: %v", err)
			}
		}
		// The control: the stuck stream is stuck.
		select {
		case n := <-wrote:
			t.Errorf("the stuck stream took all of %d bytes", n)
		default:
		}
		close(release)
		s.CloseWrite()
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestBulk(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		const size = 64 << 20
		data := make([]byte, size)
		rand.Read(data)
		app, err := e.Pod(2, 1).Serve(8080, func(c *net.TCPConn) {
			var all sync.WaitGroup
			all.Go(func() { c.Write(data); c.CloseWrite() })
			h := sha256.New()
			io.Copy(h, c)
			all.Wait()
			c.Write(h.Sum(nil)) // after CloseWrite: fails, on purpose unused
		})
		e.must(err)
		wire := e.wire()
		c := e.connect(e.Pod(1, 1), app.Addr(family))
		e.must(c.SetDeadline(time.Now().Add(scaled(30 * time.Second))))
		var all sync.WaitGroup
		all.Go(func() { c.Write(data); c.CloseWrite() })
		h := sha256.New()
		n, err := io.Copy(h, c)
		e.must(err)
		all.Wait()
		want := sha256.Sum256(data)
		if n != size || !bytes.Equal(h.Sum(nil), want[:]) {
			t.Errorf("%d bytes came with another digest", n)
		}
		data[size/2] ^= 1 // the control: the digest sees one bit
		if changed := sha256.Sum256(data); bytes.Equal(h.Sum(nil), changed[:]) {
			t.Error("control: the digest does not see a changed bit")
		}
		if b := inside(wire); b < 2*size {
			t.Errorf("%d bytes in the tunnel, want more than %d", b, 2*size)
		}
		l := e.line(d[1], "inbound", app.Addr(family))
		if l.String("bytes_recv") != "67108864" || l.String("bytes_sent") != "67108864" {
			t.Errorf("the log counts %s and %s bytes", l.String("bytes_recv"), l.String("bytes_sent"))
		}
	})
}

func TestDataThenReset(t *testing.T) {
	e, _ := mesh(t)
	ended := make(chan error, 200)
	app, err := e.Pod(2, 1).Serve(8080, func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Now().Add(scaled(10 * time.Second)))
		_, _ = io.WriteString(c, "!") // else the reset may come before there is a server
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	e.must(err)
	const n = 200
	data := make([]byte, 100<<10)
	for i := range n {
		c := e.connect(e.Pod(1, 1), app.Addr(4))
		_, err := io.ReadFull(c, make([]byte, 1))
		e.must(err)
		_, _ = c.Write(data[:1+i*500])
		_ = c.SetLinger(0)
		c.Close()
	}
	for range n {
		if err := <-ended; err == nil || isTimeout(err) { // each has its deadline
			t.Errorf("the server saw %v, want a reset", err)
		}
	}
}

var _ = lab.Peer
