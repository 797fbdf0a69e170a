// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// tagged counts what applications read on connections that each have a tag of
// their own, of which every word they carry is made.
type tagged struct {
	good    atomic.Int64 // words
	foreign atomic.Int64 // reads with bytes of another connection, or of none
	ended   atomic.Int64 // relays
}

// word is what one direction of a connection carries, in every byte different
// from its neighbours'.
func word(tag uint64, server bool) []byte {
	n := tag << 1
	if server {
		n |= 1
	}
	return binary.LittleEndian.AppendUint64(nil, n*0x9e3779b97f4a7c15+0x0123456789abcdef)
}

// read reads up to limit words, and returns the error that ended it before.
func (x *tagged) read(c net.Conn, want []byte, limit int) error {
	whole := bytes.Repeat(want, 8<<10)
	buf := make([]byte, len(whole)-len(want))
	offset := 0
	for words := 0; words < limit; {
		n, err := c.Read(buf)
		if !bytes.Equal(buf[:n], whole[offset:offset+n]) {
			x.foreign.Add(1)
			return errors.New("foreign bytes")
		}
		words += (offset + n) / len(want)
		x.good.Add(int64((offset + n) / len(want)))
		offset = (offset + n) % len(want)
		if err != nil {
			return err
		}
	}
	return nil
}

// write writes words until it fails or stop is closed.
func (x *tagged) write(c net.Conn, w []byte, stop <-chan struct{}) {
	chunk := bytes.Repeat(w, 4<<10)
	for {
		select {
		case <-stop:
			return
		default:
		}
		if _, err := c.Write(chunk[:len(w)*(1+rand.IntN(4<<10))]); err != nil {
			return
		}
	}
}

// talk is an application's end: it writes for as long as it reads, and ends the
// connection in one of several ways.
func (x *tagged) talk(c *net.TCPConn, tag uint64, server bool, limit int, finish func()) {
	stop := make(chan struct{})
	var writing sync.WaitGroup
	writing.Go(func() { x.write(c, word(tag, server), stop) })
	err := x.read(c, word(tag, !server), limit)
	if err == nil {
		finish()
	}
	close(stop)
	if errors.Is(err, io.EOF) || err == nil {
		go func() { _, _ = io.Copy(io.Discard, c) }() // so that the writer gets on
	}
	writing.Wait()
	_ = c.CloseWrite()
}

// endless is more words than a test ever moves.
const endless = 1 << 40

// serve is the application behind the tunnel; one in four resets after a while.
func (x *tagged) serve(c net.Conn, authority string) {
	limit := endless
	if rand.IntN(4) == 0 {
		limit = 1 + rand.IntN(20_000)
	}
	x.serveWords(c, authority, limit)
}

func (x *tagged) serveWords(c net.Conn, authority string, limit int) {
	tag, err := strconv.ParseUint(authority, 10, 64)
	if err != nil {
		x.foreign.Add(1)
		return
	}
	x.talk(c.(*net.TCPConn), tag, true, limit, func() { abort(c) })
}

// Connections are opened, written to at full speed, reset by either application,
// aborted on the loop and lost with their trunk, all at once. Were a number used
// after its descriptor was closed, bytes would come out of a connection with
// another tag, or a record layer would find what is no record.
func TestCloseAgainstWriteNeverReachesAReusedDescriptor(t *testing.T) {
	for _, n := range []int{2, 4} {
		t.Run(fmt.Sprint(n, " loops"), func(t *testing.T) {
			const generations, callers, calls = 3, 4, 24
			var x tagged
			var tags atomic.Uint64
			workers := make([]*relay.Worker, n)
			rigs := make([]*rig, n)
			for i := range rigs {
				rigs[i] = emptyRig(t, rigConfig{serve: x.serve, ended: func(end) { x.ended.Add(1) }})
				rigs[i].closed = make(chan closed, 2*generations)
				workers[i] = rigs[i].worker()
			}
			var all sync.WaitGroup
			opened := atomic.Int64{}
			for i, r := range rigs {
				r.client, r.server = workers[i], workers[(i+1)%n]
				all.Go(func() {
					for range generations {
						r.connect()
						var calling sync.WaitGroup
						var made atomic.Int64
						half := make(chan struct{})
						for range callers {
							calling.Go(func() {
								for range calls {
									if !x.call(r, tags.Add(1)) {
										return
									}
									opened.Add(1)
									if made.Add(1) == callers*calls/2 {
										close(half)
									}
								}
							})
						}
						<-half // the trunk ends under those that are open
						on(r.client, func() { r.trunk.Close(errGone) })
						calling.Wait()
					}
				})
			}
			all.Wait()
			for _, r := range rigs {
				for range 2 * generations {
					if e := r.trunkEnd(); brokenBytes(e.err) {
						t.Errorf("the %s's trunk ended with: %v", e.side, e.err)
					}
				}
			}
			if f := x.foreign.Load(); f != 0 {
				t.Errorf("%d connections carried bytes of others", f)
			}
			t.Logf("%d connections, %d relays, %d words", opened.Load(), x.ended.Load(), x.good.Load())
			if opened.Load() < int64(n*generations*callers*calls/4) || x.good.Load() < 100_000 {
				t.Error("too little came through to tell")
			}
		})
	}
}

var errGone = errors.New("gone")

// brokenBytes reports whether a trunk's error means that it read bytes which
// the other end did not write.
func brokenBytes(err error) bool {
	var local *record.LocalAlert
	var remote *record.PeerAlert
	var frames *h2.ConnError
	return errors.As(err, &local) || errors.As(err, &remote) || errors.As(err, &frames)
}

// call is one connection. It reports false when its trunk has gone.
func (x *tagged) call(r *rig, tag uint64) bool {
	a, c := r.appPair(0)
	defer c.Close()
	var rl *relay.Relay
	err := h2.ErrGoingAway
	on(r.client, func() {
		if rl, err = r.client.Waiting(a, &party{r: r, side: "client"}); err != nil {
			unix.Close(a)
			return
		}
		if err = r.trunk.Open(rl, request(strconv.FormatUint(tag, 10))); err != nil {
			rl.Abort(http2.ErrCodeCancel, "")
		}
	})
	if err != nil {
		return false
	}
	how := rand.IntN(3)
	x.talk(c, tag, false, 1+rand.IntN(20_000), func() {
		switch how {
		case 0:
			abort(c)
		case 1:
			r.client.Loop.Post(func() { rl.Abort(http2.ErrCodeCancel, "") })
		}
	})
	return true
}

// The control: a relay that goes on with a number which has become another
// connection's is noticed by the same oracle.
func TestForeignBytesAreNoticed(t *testing.T) {
	var x tagged
	// Both connections stay until the end: one that were reset meanwhile would
	// leave no number to be reused.
	r := newRigWith(t, rigConfig{loops: 2, serve: func(c net.Conn, authority string) { x.serveWords(c, authority, endless) }})
	var fds [2]int
	var all sync.WaitGroup
	for i := range fds {
		a, c := r.appPair(0)
		var err error
		on(r.client, func() {
			var rl *relay.Relay
			if rl, err = r.client.Waiting(a, &party{r: r, side: "client"}); err == nil {
				err = r.trunk.Open(rl, request(strconv.Itoa(i+1)))
				fds[i] = rl.FD()
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		t.Cleanup(func() { c.Close() })
		all.Go(func() { x.write(c, word(uint64(i+1), false), stop) })
		all.Go(func() {
			if err := x.read(c, word(uint64(i+1), true), endless); err != nil {
				c.Close()
			}
			close(stop)
		})
	}
	poll(t, "some words", func() bool { return x.good.Load() > 1000 })
	if x.foreign.Load() != 0 {
		t.Fatal("foreign bytes before there were any")
	}
	on(r.client, func() {
		if err := unix.Dup3(fds[0], fds[1], unix.O_CLOEXEC); err != nil {
			t.Error(err)
		}
	})
	poll(t, "an alarm", func() bool { return x.foreign.Load() > 0 })
	on(r.client, func() { r.trunk.Close(errGone) })
	all.Wait()
}
