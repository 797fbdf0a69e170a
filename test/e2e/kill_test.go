// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// The streams of TestKillUnderLoad, by the byte that they begin with: which halves
// are open when a daemon dies. The others have ended in good order.
const (
	bothOpen   = 'b'
	serverOpen = 's' // the client has had its say, and its FIN was taken
	clientOpen = 'c'
)

// ending is how a stream ended for one of its applications.
type ending struct {
	what           string
	gave, took     bool // in the middle of it when the daemon died
	giving, taking error
}

// fault says what is wrong with how it ended: each half that had ended in good order
// is to be whole, and the end of one that was cut is not to look clean.
func (x ending) fault() string {
	switch {
	case !x.gave && x.giving != nil || !x.took && x.taking != nil:
		return "a half that had ended was not whole"
	case x.gave && !isReset(x.giving):
		return "it is not told that what it gives is lost"
	// The kernel says ECONNRESET once, to who asks first; then come EPIPE for who
	// gives, and an end for who takes.
	case x.took && !isReset(x.taking) && !(errors.Is(x.taking, errShort) && errors.Is(x.giving, syscall.ECONNRESET)):
		return "a part looks whole"
	}
	return ""
}

// bulk are streams in which both ends give and take.
type bulk struct {
	ends    chan ending
	moving  atomic.Int64 // halves that have moved a good deal
	clients sync.WaitGroup
}

// progress says once that much has been read.
type progress struct {
	io.Reader
	n    int64
	much func()
}

func (p *progress) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	if p.n += int64(n); p.n > 512<<10 && p.much != nil {
		p.much()
		p.much = nil
	}
	return n, err
}

// endOf does an end of a stream. A half of it that is not in the middle ends before
// the other begins.
func (b *bulk) endOf(c *net.TCPConn, what string, gives, takes bool) {
	_ = c.SetDeadline(time.Now().Add(4 * patience()))
	x := ending{what: what, gave: gives, took: takes}
	give := func(n int64) {
		if x.giving = give(c, n); x.giving == nil {
			x.giving = c.CloseWrite()
		}
	}
	take := func(much func()) {
		if _, x.taking = take(&progress{Reader: c, much: much}); x.taking == nil {
			x.taking = takeEnd(c)
		}
	}
	var all sync.WaitGroup
	if !gives {
		give(100 << 10)
	}
	if !takes {
		take(nil)
	}
	if gives {
		all.Go(func() { give(endless) })
	}
	if takes {
		take(func() { b.moving.Add(1) })
	}
	all.Wait()
	b.ends <- x
}

// serve is the server's end.
func (b *bulk) serve(c *net.TCPConn) {
	var kind [1]byte
	if _, err := io.ReadFull(c, kind[:]); err != nil {
		b.ends <- ending{what: "server", giving: err}
		return
	}
	b.endOf(c, fmt.Sprintf("server of %q", kind), kind[0] != clientOpen, kind[0] != serverOpen)
}

// call is the client's.
func (b *bulk) call(c *net.TCPConn, kind byte) {
	b.clients.Go(func() {
		defer c.Close()
		if _, err := c.Write([]byte{kind}); err != nil {
			b.ends <- ending{what: "client", giving: err}
			return
		}
		b.endOf(c, fmt.Sprintf("client of %q", kind), kind != serverOpen, kind != clientOpen)
	})
}

// fetches takes messages of many lengths that end with their connection, until the
// context ends: deaths are to meet them at any point, the last bytes included.
func (l *load) fetches(ctx context.Context, from *lab.Pod, to *lab.Pod, family int, count *tally) {
	for ctx.Err() == nil {
		count.count("fetch by "+from.Name, func() error {
			dial, cancel := context.WithTimeout(context.Background(), patience())
			defer cancel()
			c, err := from.Dial(dial, portOf(to, family, 8082))
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(4 * patience()))
			if _, err := take(c); err != nil {
				return err
			}
			return takeEnd(c)
		}())
		select {
		case <-ctx.Done():
		case <-time.After(time.Millisecond): // a refusal takes no time
		}
	}
}

// TestKillUnderLoad: daemons are killed in the middle of bulk, requests and fetches,
// one node's after the other's. No application takes a part for the whole; what is
// called without a daemon is refused at once, and never in plaintext.
func TestKillUnderLoad(t *testing.T) {
	const kills = 10
	l, before := ready(t)
	e := l.e
	streams := &bulk{ends: make(chan ending, 256)}
	for _, n := range e.Nodes {
		for _, p := range n.Pods[:2] {
			_, err := p.Serve(8081, streams.serve)
			e.must(err)
			_, err = p.Serve(8082, func(c *net.TCPConn) { _ = give(c, 1+rand.Int64N(1<<(10+rand.IntN(12)))) })
			e.must(err)
		}
	}
	ctx, cancel := context.WithCancel(e.ctx)
	var fetches tally
	var fetchers sync.WaitGroup
	defer fetchers.Wait()
	defer cancel()
	for i := range 4 {
		fetchers.Go(func() { l.fetches(ctx, e.Pod(1+i%2, 1), e.Pod(2-i%2, 1+i/2), 4+i/2*2, &fetches) })
	}

	var again []time.Duration
	slowest := time.Duration(0)
	seen := map[string]int{}
	for i := range kills {
		want := 0
		for k, kind := range []byte{bothOpen, serverOpen, clientOpen, bothOpen, serverOpen, clientOpen} {
			node := 1 + (k/3+i)%2
			c, err := e.Pod(node, 2).Dial(e.ctx, portOf(e.Pod(3-node, 2), 4+(i+k)%2*2, 8081))
			e.must(err)
			streams.call(c, kind)
			want += 2
		}
		const open = 2 * (2 + 1 + 1)
		e.must(lab.Until(e.ctx, "all streams move", func() error {
			if n := streams.moving.Load(); n < int64(open*(i+1)) {
				return fmt.Errorf("%d of %d do", n-int64(open*i), open)
			}
			return nil
		}))
		dead := i % 2
		l.d[dead].Kill()

		fastest := time.Hour
		for k := range 6 {
			begun := time.Now()
			c, err := e.Pod(dead+1, 1+k%2).Dial(e.ctx, at(e.Pod(2-dead, 1), 4+k/2%2*2))
			if fastest = min(fastest, time.Since(begun)); !isRefused(err) {
				t.Errorf("connect without a daemon: %v, want it refused", err)
			}
			if err == nil {
				c.Close()
			}
		}
		if slowest = max(slowest, fastest); fastest > atOnce() {
			t.Errorf("the fastest refusal took %v, want %v at most", fastest, atOnce())
		}
		for range want {
			select {
			case x := <-streams.ends:
				if f := x.fault(); f != "" {
					t.Errorf("kill %d: %s: %s: giving %v, taking %v", i+1, x.what, f, x.giving, x.taking)
				}
				seen[fmt.Sprintf("%s: %s, %s", x.what, cause(x.giving), cause(x.taking))]++
			case <-e.ctx.Done():
				t.Fatalf("kill %d: not all ends of streams were told: %v", i+1, context.Cause(e.ctx))
			}
		}
		_, served := l.start(t, dead)
		again = append(again, served)
	}
	cancel()
	fetchers.Wait()
	streams.clients.Wait()
	l.end()
	t.Logf("%d kills: requests: %s; fetches: %s; streams: %v; the slowest refusal %v, all callers served (median, most): %s",
		kills, &l.all, &fetches, seen, slowest.Round(10*time.Microsecond), spread(again))
	l.all.check(t)
	fetches.check(t)
	if l.all.told.Load() == 0 || fetches.told.Load() == 0 || fetches.whole.Load() == 0 {
		t.Error("control: no request or fetch noticed that daemons died, or none was whole")
	}
	l.unchanged(t, before)
	l.secret(t)
}

// cause is the error without its addresses.
func cause(err error) string {
	for next := err; next != nil; next = errors.Unwrap(next) {
		err = next
	}
	if err == nil {
		return "none"
	}
	return err.Error()
}

// TestPartIsTold is the control of those who take: without any mesh an end in good
// order before the whole is there is seen, and so are a changed byte, a byte more,
// and a reset.
func TestPartIsTold(t *testing.T) {
	e := setup(t)
	const n = 1 << 20
	cases := map[string]struct {
		give func(*net.TCPConn)
		want func(error) bool
	}{
		"whole":                 {func(c *net.TCPConn) { _ = give(c, n) }, func(err error) bool { return err == nil }},
		"short":                 {func(c *net.TCPConn) { _ = give(&cutter{Writer: c, left: n / 2}, n) }, func(err error) bool { return errors.Is(err, errShort) }},
		"without its last byte": {func(c *net.TCPConn) { _ = give(&cutter{Writer: c, left: 8 + n + 31}, n) }, func(err error) bool { return errors.Is(err, errShort) }},
		"empty":                 {func(c *net.TCPConn) {}, func(err error) bool { return errors.Is(err, errShort) }},
		"changed":               {func(c *net.TCPConn) { _ = give(&cutter{Writer: c, left: n / 2, flip: true}, n) }, func(err error) bool { return errors.Is(err, errChanged) }},
		"more":                  {func(c *net.TCPConn) { _ = give(c, n); _, _ = c.Write([]byte{0}) }, func(err error) bool { return errors.Is(err, errMore) }},
		"reset": {func(c *net.TCPConn) {
			_ = give(&cutter{Writer: c, left: n / 2}, n)
			_ = c.SetLinger(0)
		}, isReset},
	}
	port := uint16(8080)
	for name, tc := range cases {
		port++
		app, err := e.Pod(2, 3).Serve(port, tc.give)
		e.must(err)
		t.Run(name, func(t *testing.T) {
			families(t, func(t *testing.T, family int) {
				c := e.connect(e.Pod(1, 3), app.Addr(family))
				_, err := take(c)
				if err == nil {
					err = takeEnd(c)
				}
				if !tc.want(err) {
					t.Errorf("the taker says %v", err)
				}
			})
		})
	}
}

// cutter passes so much on, then nothing more, or all with one bit changed.
type cutter struct {
	io.Writer
	left int
	flip bool
}

func (w *cutter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left > 0 {
		return w.Writer.Write(p)
	}
	if w.flip {
		w.flip, w.left = false, 1<<40
		p = append([]byte(nil), p...)
		p[len(p)/2] ^= 1
		return w.Writer.Write(p)
	}
	_, _ = w.Writer.Write(p[:len(p)+w.left])
	return 0, io.ErrClosedPipe
}
