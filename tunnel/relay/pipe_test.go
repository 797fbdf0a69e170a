// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// pipes makes pipes on one loop.
type pipes struct {
	*rig
	w    *relay.Worker
	over chan pipeEnd
}

type pipeEnd struct {
	how                relay.End
	detail             string
	fromClient, toward uint64
}

// PipeClosed is relay.PipeOwner's.
func (p *pipes) PipeClosed(q *relay.Pipe, how relay.End, detail string) {
	p.over <- pipeEnd{how, detail, q.FromClient(), q.ToClient()}
}

func newPipes(t testing.TB) *pipes {
	r := emptyRig(t, rigConfig{})
	return &pipes{rig: r, w: r.worker(), over: make(chan pipeEnd, 1<<16)}
}

// PipeConnected is relay.PipeOwner's.
func (p *pipes) PipeConnected(q *relay.Pipe, err error) {
	if err != nil {
		q.Abort(err.Error())
		return
	}
	q.Open()
}

// join makes an open pipe of two connections.
func (p *pipes) join(a, b int) (q *relay.Pipe, err error) {
	on(p.w, func() {
		if q, err = p.w.Piping(a, p); err != nil {
			return
		}
		if err = q.Connect(b); err == nil {
			q.Established()
		}
	})
	return q, err
}

// open returns both applications of a new pipe. Buffers are bytes of each of its
// four sockets; 0: the kernel's choice.
func (p *pipes) open(buffers int) (q *relay.Pipe, client, app *net.TCPConn) {
	p.t.Helper()
	a, client := p.appPair(buffers)
	b, app := p.appPair(buffers)
	q, err := p.join(a, b)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { client.Close(); app.Close() })
	return q, client, app
}

func (p *pipes) end() pipeEnd { p.t.Helper(); return receive(p.t, p.over, "a pipe's end") }

func TestPipeHalfCloses(t *testing.T) {
	p := newPipes(t)
	for _, first := range []string{"client", "app"} {
		_, client, app := p.open(0)
		x, y := client, app
		if first == "app" {
			x, y = app, client
		}
		say := func(from, to *net.TCPConn, text string) {
			t.Helper()
			if _, err := io.WriteString(from, text); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(text))
			if _, err := io.ReadFull(to, got); err != nil || string(got) != text {
				t.Fatalf("got %q, %v", got, err)
			}
		}
		ends := func(c *net.TCPConn) {
			t.Helper()
			if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Fatalf("got %d bytes, %v, want the end", n, err)
			}
		}
		say(x, y, "one")
		say(y, x, "two and")
		x.CloseWrite()
		ends(y)
		say(y, x, " three") // the other half goes on
		y.CloseWrite()
		ends(x)
		e := p.end()
		if first == "app" {
			e.fromClient, e.toward = e.toward, e.fromClient
		}
		if e.how != relay.EndClean || e.fromClient != 3 || e.toward != 13 {
			t.Errorf("closed by the %s first: %+v", first, e)
		}
	}
}

func TestPipeResetCrosses(t *testing.T) {
	p := newPipes(t)
	for _, from := range []string{"client", "app"} {
		for _, halfClosed := range []bool{false, true} {
			_, client, app := p.open(0)
			x, y, want := client, app, relay.EndPeerReset
			if from == "app" {
				x, y, want = app, client, relay.EndAppReset
			}
			if halfClosed { // its socket is read no more
				x.CloseWrite()
				if n, err := y.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Fatalf("got %d bytes, %v, want the end", n, err)
				}
			}
			abort(x)
			if halfClosed {
				// The other has had its end, and says nothing: the pipe has to
				// end without being told by a write.
			} else if _, err := io.ReadAll(y); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("reset by the %s: the other saw %v", from, err)
			}
			if e := p.end(); e.how != want {
				t.Errorf("reset by the %s, half closed %v: %+v", from, halfClosed, e)
			}
		}
	}
}

func TestPipeAbort(t *testing.T) {
	p := newPipes(t)
	q, client, app := p.open(0)
	on(p.w, func() {
		q.Abort("because")
		q.Abort("again")
	})
	for _, c := range []net.Conn{client, app} {
		if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("saw %v, want a reset", err)
		}
	}
	if e := p.end(); e.how != relay.EndAborted || e.detail != "because" {
		t.Errorf("%+v", e)
	}
	if n := len(p.over); n != 0 {
		t.Errorf("%d more ends", n)
	}
}

// The same as for streams: a pipe reads to the error, and where it may not read,
// because nobody drains the other end, it ends without.
func TestPipeDataFollowedByResetNeverHangs(t *testing.T) {
	want := pattern(4 << 20)
	for _, tt := range []struct {
		name string
		n    int
		size func(i int) int
		held bool // the loop sees data and reset at once
		read bool // the application reads
	}{
		{"before a wait", 500, func(i int) int { return 1 + i*400 }, true, true},
		{"during a wait", 500, func(i int) int { return 1 + i*400 }, false, true},
		{"nobody reads, before a wait", 20, func(i int) int { return 512<<10 + i*1000 }, true, false},
		{"nobody reads, during a wait", 20, func(i int) int { return 512<<10 + i*1000 }, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPipes(t)
			for i := 0; i < tt.n; i += pace {
				buffers := 512 << 10
				if !tt.read {
					buffers = 16 << 10
				}
				_, client, app := p.open(buffers)
				release := func() {}
				if tt.held {
					release = hold(p.w)
				}
				saw := make(chan error, 1)
				if tt.read {
					go func() {
						b, err := io.ReadAll(app)
						if !bytes.Equal(b, want[:len(b)]) {
							err = fmt.Errorf("%d bytes that are no prefix", len(b))
						}
						saw <- err
					}()
				}
				_ = client.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)) // where nobody reads
				_, _ = client.Write(want[:tt.size(i)])
				abort(client)
				release()
				e := p.end()
				if e.how != relay.EndPeerReset {
					t.Fatalf("connection %d of %d bytes: %+v", i, tt.size(i), e)
				}
				if !tt.read {
					if e.fromClient >= uint64(tt.size(i)) {
						t.Fatalf("connection %d: all of %d bytes went, so nothing was stuck", i, tt.size(i))
					}
					continue
				}
				if err := receive(t, saw, "what the application saw"); !errors.Is(err, unix.ECONNRESET) {
					t.Fatalf("connection %d: the application saw %v", i, err)
				}
			}
		})
	}
}

// One that reads nothing slows its sender down and nobody else, and loses nothing.
func TestPipeStuckReader(t *testing.T) {
	p := newPipes(t)
	stuck, client, app := p.open(16 << 10)
	want := pattern(8 << 20)
	wrote := make(chan error, 1)
	go func() {
		_, err := client.Write(want)
		client.CloseWrite()
		wrote <- err
	}()
	var before, after uint64
	poll(t, "the stuck one", func() bool {
		before = after
		on(p.w, func() { after = stuck.FromClient() })
		return after > 0 && after == before
	})
	for range 100 {
		_, c, a := p.open(0)
		go func() { _, _ = io.Copy(a, a); _ = a.CloseWrite() }()
		if _, err := c.Write(want[:1000]); err != nil {
			t.Fatal(err)
		}
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, want[:1000]) {
			t.Fatalf("beside a stuck one: %d bytes, %v", len(b), err)
		}
		if e := p.end(); e.how != relay.EndClean {
			t.Fatalf("%+v", e)
		}
	}
	select {
	case err := <-wrote:
		t.Fatalf("8 MiB were taken from its sender, %v", err)
	default:
	}
	got := make([]byte, 0, len(want))
	for len(got) < len(want) {
		_ = client.SetDeadline(time.Now().Add(patience)) // for each step: a stall is seen
		_ = app.SetDeadline(time.Now().Add(patience))
		n, err := app.Read(got[len(got):cap(got)])
		got = got[:len(got)+n]
		if err != nil {
			t.Fatalf("%d bytes of %d came in the end, %v", len(got), len(want), err)
		}
	}
	if rest, err := io.ReadAll(app); err != nil || len(rest) > 0 || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes of %d came in the end, and %d more, %v", len(got), len(want), len(rest), err)
	}
	if err := receive(t, wrote, "the sender"); err != nil {
		t.Fatal(err)
	}
	app.CloseWrite()
	if e := p.end(); e.how != relay.EndClean || e.fromClient != uint64(len(want)) {
		t.Fatalf("%+v", e)
	}
}

func TestPipeBulkIsWhole(t *testing.T) {
	p := newPipes(t)
	for buffers, size := range map[int]int{0: 16 << 20, 20_000: 2 << 20} {
		_, client, app := p.open(buffers)
		var all sync.WaitGroup
		sums := make([][2][32]byte, 2)
		for i, c := range []*net.TCPConn{client, app} {
			all.Go(func() {
				h := sha256.New()
				seed := [32]byte{byte(i)}
				r := rand.NewChaCha8(seed)
				b := make([]byte, 100_000)
				for left := size; left > 0; {
					_ = c.SetDeadline(time.Now().Add(patience)) // for each step: a stall is seen
					n := min(left, 1+int(r.Uint64()%uint64(len(b))))
					_, _ = r.Read(b[:n])
					h.Write(b[:n])
					if _, err := c.Write(b[:n]); err != nil {
						t.Error(err)
						return
					}
					left -= n
				}
				c.CloseWrite()
				sums[i][0] = [32]byte(h.Sum(nil))
			})
			all.Go(func() {
				h := sha256.New()
				if n, err := io.Copy(h, c); err != nil || n != int64(size) {
					t.Errorf("%d bytes, %v", n, err)
				}
				sums[i][1] = [32]byte(h.Sum(nil))
			})
		}
		all.Wait()
		if sums[0][0] != sums[1][1] || sums[1][0] != sums[0][1] {
			t.Errorf("with buffers of %d: other bytes came than went", buffers)
		}
		if e := p.end(); e.how != relay.EndClean || e.fromClient != uint64(size) || e.toward != uint64(size) {
			t.Fatalf("%+v", e)
		}
	}
}

// A turn moves no more than its share, so that others have theirs.
func TestPipeTurnIsBounded(t *testing.T) {
	const share = 3 * 2 * 64 << 10
	p := newPipes(t)
	q, client, app := p.open(4 << 20)
	release := hold(p.w)
	_ = client.SetWriteDeadline(time.Now().Add(time.Second))
	n, err := client.Write(make([]byte, 2<<20))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		release()
		t.Fatal(err)
	}
	if n < 2*share {
		release()
		t.Fatalf("the kernel holds %d bytes only: run this as root", n)
	}
	go func() { _, _ = io.Copy(io.Discard, app) }()
	done := make(chan uint64, 1)
	var last, most uint64
	var look func()
	look = func() { // once in each turn
		now := q.FromClient()
		most = max(most, now-last)
		last = now
		if now >= uint64(n) {
			done <- most
			return
		}
		p.w.Loop.Post(look)
	}
	p.w.Loop.Post(look)
	release()
	if got := receive(t, done, "the data"); got > share {
		t.Errorf("one turn moved %d bytes", got)
	}
}

// Pipes are opened, written to at full speed, reset by either application and
// aborted on the loop, all at once; see the same test of streams.
func TestPipeCloseAgainstWriteNeverReachesAReusedDescriptor(t *testing.T) {
	var x tagged
	var tags atomic.Uint64
	const callers, calls = 8, 60
	p := newPipes(t)
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			for range calls {
				tag := tags.Add(1)
				a, c := p.appPair(0)
				b, app := p.appPair(0)
				q, err := p.join(a, b)
				if err != nil {
					t.Error(err)
					return
				}
				served := make(chan struct{})
				go func() { defer close(served); defer app.Close(); x.serve(app, strconv.FormatUint(tag, 10)) }()
				how := rand.IntN(3)
				x.talk(c, tag, false, 1+rand.IntN(20_000), func() {
					switch how {
					case 0:
						abort(c)
					case 1:
						p.w.Loop.Post(func() { q.Abort("") })
					}
				})
				c.Close()
				<-served
			}
		})
	}
	all.Wait()
	for range callers * calls {
		p.end()
	}
	if f := x.foreign.Load(); f != 0 {
		t.Errorf("%d connections carried bytes of others", f)
	}
	if x.good.Load() < 100_000 {
		t.Error("too little came through to tell")
	}
}

// A pipe whose application is not reached yet: what the client has sent waits,
// sockets are tried one after the other, and a client that resets ends it.
func TestPipeConnecting(t *testing.T) {
	p := newPipes(t)
	socket := func(connect bool, to net.Addr) int {
		t.Helper()
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if connect {
			at := to.(*net.TCPAddr)
			err := unix.Connect(fd, &unix.SockaddrInet4{Port: at.Port, Addr: [4]byte(at.IP.To4())})
			if err != nil && err != unix.EINPROGRESS {
				t.Fatal(err)
			}
		}
		return fd
	}
	piping := func() (q *relay.Pipe, client *net.TCPConn) {
		t.Helper()
		a, client := p.appPair(0)
		t.Cleanup(func() { client.Close() })
		on(p.w, func() {
			var err error
			if q, err = p.w.Piping(a, p); err != nil {
				t.Error(err)
			}
			if !q.Disconnected() {
				t.Error("it is connected to nothing")
			}
		})
		return q, client
	}

	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	q, client := piping()
	if _, err := io.WriteString(client, "early"); err != nil {
		t.Fatal(err)
	}
	client.CloseWrite()
	on(p.w, func() {
		// The first socket goes unanswered: it has asked nobody.
		if err := q.Connect(socket(false, nil)); err != nil {
			t.Error(err)
		}
		if q.Disconnected() || !q.Disconnect() || !q.Disconnected() {
			t.Error("the first socket was not given up")
		}
		if err := q.Connect(socket(true, l.Addr())); err != nil {
			t.Error(err)
		}
	})
	app, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	_ = app.SetDeadline(time.Now().Add(patience))
	if b, err := io.ReadAll(app); err != nil || string(b) != "early" {
		t.Fatalf("the application got %q, %v", b, err)
	}
	on(p.w, func() {
		if q.Disconnect() {
			t.Error("a pipe that is open was disconnected")
		}
	})
	app.Close()
	if e := p.end(); e.how != relay.EndClean || e.fromClient != 5 {
		t.Fatalf("%+v", e)
	}

	_, client = piping()
	abort(client)
	if e := p.end(); e.how != relay.EndPeerReset {
		t.Fatalf("a client that resets before: %+v", e)
	}

	q, client = piping()
	l.Close()
	on(p.w, func() {
		if err := q.Connect(socket(true, l.Addr())); err != nil {
			t.Error(err)
		}
	})
	if e := p.end(); e.how != relay.EndAborted || e.detail != unix.ECONNREFUSED.Error() {
		t.Fatalf("an application that is not there: %+v", e)
	}
	if _, err := io.ReadAll(client); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client saw %v", err)
	}
}
