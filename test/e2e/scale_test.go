// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// echoAt has this binary be an echo server at an address, and nothing else: one
// with descriptors of its own.
const echoAt = "CULVERT_E2E_ECHO"

// echo serves until it is killed.
func echo(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			b := make([]byte, 512) // io.Copy would take a pipe, and so three descriptors
			for {
				n, err := c.Read(b)
				if err != nil {
					return
				}
				if _, err := c.Write(b[:n]); err != nil {
					return
				}
			}
		}()
	}
}

// echoProcess runs echo in a pod, as a process.
func (e *env) echoProcess(p *lab.Pod, port uint16) {
	e.t.Helper()
	self, err := os.Executable()
	e.must(err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=:%d", echoAt, port))
	cmd.Stderr = os.Stderr
	server, err := p.Start(cmd)
	e.must(err)
	e.must(lab.Until(e.ctx, "the echo server answers in its pod", func() error {
		c, err := p.Dial(e.ctx, portOf(p, 4, port))
		if err != nil {
			return err
		}
		return c.Close()
	}, server.Ended))
}

// descriptors gives this process, and those that it starts, at least n.
func descriptors(t *testing.T, n uint64) {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur >= n && limit.Max >= n {
		return
	}
	limit.Cur, limit.Max = max(limit.Cur, n), max(limit.Max, n)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatalf("raise the limit of descriptors to %d: %v", n, err)
	}
}

// TestTenThousandAtOnce: so many connections through one pair of pods are open at
// the same time, and each is its own.
func TestTenThousandAtOnce(t *testing.T) {
	userSpace(t)
	const n, workers = 10000, 64
	descriptors(t, n+4000)
	e := setup(t)
	e.takes(scaled(2 * time.Minute))
	d := e.start(lab.DaemonConfig{})
	from, to := e.Pod(1, 1), e.Pod(2, 1)
	e.echoProcess(to, 8080)
	for _, family := range []int{4, 6} {
		e.must(e.call(from, at(to, family)))
	}
	before := []held{e.holds(d[0]), e.holds(d[1])}

	conns := make([]*net.TCPConn, n)
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	deadline, _ := e.ctx.Deadline()
	each := func(what string, f func(i int) error) {
		t.Helper()
		begun := time.Now()
		var all sync.WaitGroup
		for w := range workers {
			all.Go(func() {
				for i := w; i < n; i += workers {
					if err := f(i); err != nil {
						t.Errorf("%s: connection %d of %d: %v", what, i, n, err)
						return
					}
				}
			})
		}
		all.Wait()
		if t.Failed() {
			t.FailNow()
		}
		t.Logf("%s: %v", what, time.Since(begun).Round(time.Millisecond))
	}
	text := func(i int, when string) string { return fmt.Sprintf("connection %d %s", i, when) }
	each("all are opened, and exchange", func(i int) (err error) {
		if conns[i], err = from.Dial(e.ctx, at(to, 4+i%2*2)); err != nil {
			return err
		}
		if err := conns[i].SetDeadline(deadline); err != nil {
			return err
		}
		return exchange(conns[i], text(i, "first"))
	})
	with := []held{e.holds(d[0]), e.holds(d[1])}
	for i := range d {
		if with[i].descriptors < before[i].descriptors+n {
			t.Errorf("control: with %d connections node %d has %v, and before %v", n, i+1, with[i], before[i])
		}
	}
	// Each of them says something before any is answered, so that answers which are
	// another's would be seen.
	each("all ask again", func(i int) error {
		_, err := io.WriteString(conns[i], text(i, "again"))
		return err
	})
	each("all are answered", func(i int) error {
		return lab.Expect(conns[i], text(i, "again"))
	})
	each("all end in good order", func(i int) error {
		if err := conns[i].CloseWrite(); err != nil {
			return err
		}
		return takeEnd(conns[i])
	})
	for i, reporter := range []string{"source", "destination"} {
		var after held
		e.must(lab.Until(e.ctx, "all are counted as ended, and what they took is given back", func() error {
			after = e.holds(d[i])
			ok := e.sum(d[i], "culvert_connections_closed_total", "reporter", reporter, "reason", "ok")
			if ok < n || after.descriptors > before[i].descriptors+256 { // sockets in stock, and sessions
				return fmt.Errorf("%v ended well; before %v; after %v", ok, before[i], after)
			}
			return nil
		}))
		t.Logf("node %d, %v handshakes: before %v; with %d connections %v; after %v", i+1, e.sum(d[i], successes), before[i], n, with[i], after)
		if per := (with[i].memory - before[i].memory) * (1 << 20) / n; per > 32<<10 {
			t.Errorf("node %d: a connection costs %.0f bytes, want 32 KiB at most", i+1, per)
		}
	}
}

// TestTwoGibibytesBothWays: so much crosses in both directions at once, on one
// connection and on eight, and is whole; the daemons hold little of it.
func TestTwoGibibytesBothWays(t *testing.T) {
	total := int64(2 << 30)
	if lab.Slowness() > 1 {
		total = 64 << 20
	}
	const most = 256 // MiB
	for _, streams := range []int{1, 8} {
		t.Run(fmt.Sprint(streams), func(t *testing.T) {
			e := setup(t)
			e.takes(scaled(3 * time.Minute))
			d := e.start(lab.DaemonConfig{})
			deadline, _ := e.ctx.Deadline()
			size := total / int64(streams)
			// both does one end of a connection.
			both := func(c *net.TCPConn) error {
				_ = c.SetDeadline(deadline)
				gave := make(chan error, 1)
				go func() {
					err := give(c, size)
					gave <- errors.Join(err, c.CloseWrite())
				}()
				n, err := take(c)
				if err == nil {
					err = takeEnd(c)
				}
				if err == nil && n != size {
					err = errChanged
				}
				return errors.Join(err, <-gave)
			}
			ends := make(chan error, 2*streams)
			app, err := e.Pod(2, 1).Serve(8080, func(c *net.TCPConn) { ends <- both(c) })
			e.must(err)
			begun := time.Now()
			for i := range streams {
				c := e.connect(e.Pod(1, 1), app.Addr(4+i%2*2))
				go func() { ends <- both(c) }()
			}
			var memory [2]float64
			tick := time.NewTicker(200 * time.Millisecond)
			defer tick.Stop()
			for left := 2 * streams; left > 0; {
				select {
				case err := <-ends:
					left--
					if err != nil {
						t.Errorf("an end: %v", err)
					}
				case <-tick.C:
					for i := range d {
						memory[i] = max(memory[i], e.sum(d[i], "process_resident_memory_bytes")/(1<<20))
					}
				}
			}
			took := time.Since(begun)
			t.Logf("%d MiB each way on %d connections in %v, %.0f MiB/s both ways together; the daemons held %.0f and %.0f MiB at most, their descriptors %v and %v",
				total>>20, streams, took.Round(time.Millisecond), float64(2*total>>20)/took.Seconds(), memory[0], memory[1], e.sum(d[0], "process_open_fds"), e.sum(d[1], "process_open_fds"))
			lines, err := d[1].WaitAccessLog(e.ctx, streams, func(l lab.Entry) bool { return l.String("direction") == "inbound" })
			e.must(err)
			want := fmt.Sprint(size + 8 + sha256.Size)
			for _, l := range lines {
				if l.String("reason") != "ok" || l.String("bytes_sent") != want || l.String("bytes_recv") != want {
					t.Errorf("the log says %s, and %s and %s bytes, want %s", l.String("reason"), l.String("bytes_sent"), l.String("bytes_recv"), want)
				}
			}
			for i, m := range memory {
				if m > most {
					t.Errorf("the daemon of node %d held %.0f MiB, want %d at most", i+1, m, most)
				}
			}
		})
	}
}
