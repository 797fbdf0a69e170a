// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
)

// discardAll reads with a buffer as large as applications that care use.
func discardAll(c net.Conn) {
	buf := make([]byte, 256<<10)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
	}
}

// atOnce measures b.N operations, of which each connection does its share, n.
func atOnce(b *testing.B, conns []*net.TCPConn, share func(c *net.TCPConn, n int) error) {
	b.ReportAllocs()
	b.ResetTimer()
	var all sync.WaitGroup
	for i, c := range conns {
		n := b.N / len(conns)
		if i < b.N%len(conns) {
			n++
		}
		all.Go(func() {
			if err := share(c, n); err != nil {
				b.Error(err)
			}
		})
	}
	all.Wait()
}

// BenchmarkRelayBulk is from an application's socket to the other's: relay,
// record layer, relay, in one process with a loop for each side. One operation
// is 1 MiB.
func BenchmarkRelayBulk(b *testing.B) {
	const size = 1 << 20
	for _, streams := range []int{1, 8} {
		b.Run(map[int]string{1: "1 stream", 8: "8 streams"}[streams], func(b *testing.B) {
			r := newRig(b, 2, discardAll)
			conns := make([]*net.TCPConn, streams)
			for i := range conns {
				conns[i] = r.dial()
				// The window grows with use: let it.
				if _, err := conns[i].Write(make([]byte, 8<<20)); err != nil {
					b.Fatal(err)
				}
			}
			msg := make([]byte, size)
			b.SetBytes(size)
			atOnce(b, conns, func(c *net.TCPConn, n int) error {
				for range n {
					if _, err := c.Write(msg); err != nil {
						return err
					}
				}
				return c.CloseWrite()
			})
			// What is in the sockets' buffers belongs to it too.
			for range 2 * streams {
				r.end()
			}
		})
	}
}

// echo64 is an application that answers each 64 bytes with the same.
func echo64(c net.Conn) {
	buf := make([]byte, 64)
	for {
		if _, err := io.ReadFull(c, buf); err != nil {
			return
		}
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
}

// A request on an open stream allocates nothing, from the client's socket through
// both relays and the records between them to the server's, and back.
func TestRequestDoesNotAllocate(t *testing.T) {
	r := newRig(t, 2, echo64)
	c := r.dial()
	buf := make([]byte, 64)
	ask := func(n int) {
		for range n {
			if _, err := c.Write(buf); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, buf); err != nil {
				t.Fatal(err)
			}
		}
	}
	const requests = 5000
	ask(requests / 10)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	ask(requests)
	runtime.ReadMemStats(&after)
	// The runtime's own, such as its collector's workers, come into it.
	if per := float64(after.Mallocs-before.Mallocs) / float64(requests); per > 0.02 {
		t.Errorf("%.3f allocations a request", per)
	}
}

// BenchmarkRelaySmall is one request of 64 bytes and its answer, by each of the
// connections in turn or at once.
func BenchmarkRelaySmall(b *testing.B) {
	for _, conns := range []int{1, 32} {
		b.Run(map[int]string{1: "1 connection", 32: "32 connections"}[conns], func(b *testing.B) {
			r := newRig(b, 2, echo64)
			request := make([]byte, 64)
			answer := func(c net.Conn, buf []byte) error {
				if _, err := c.Write(request); err != nil {
					return err
				}
				_, err := io.ReadFull(c, buf)
				return err
			}
			all := make([]*net.TCPConn, conns)
			for i := range all {
				all[i] = r.dial()
				if err := answer(all[i], make([]byte, 64)); err != nil {
					b.Fatal(err)
				}
			}
			atOnce(b, all, func(c *net.TCPConn, n int) error {
				buf := make([]byte, 64)
				for range n {
					if err := answer(c, buf); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
}
