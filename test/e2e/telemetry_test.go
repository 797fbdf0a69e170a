// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// The bytes of a connection that is open are counted when the daemons are scraped,
// at both ends, and once.
func TestBytesAreCountedMeanwhile(t *testing.T) {
	e := setup(t)
	d := e.start(lab.DaemonConfig{Settings: map[string]any{
		"mode": "permissive", "log": map[string]any{"format": "text", "level": "debug"},
	}})
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	for name, tt := range map[string]struct {
		from      *lab.Pod
		security  string
		reporters map[string]*lab.Daemon
	}{
		"mutual TLS": {e.Pod(1, 1), "mutual_tls", map[string]*lab.Daemon{"source": d[0], "destination": d[1]}},
		"plaintext":  {e.Pod(1, 3), "none", map[string]*lab.Daemon{"destination": d[1]}},
	} {
		t.Run(name, func(t *testing.T) {
			e := e.in(t)
			wants := func(when string, bytes int, closed float64) {
				t.Helper()
				for reporter, d := range tt.reporters {
					labels := []string{"reporter", reporter, "connection_security_policy", tt.security}
					for metric, want := range map[string]float64{
						"istio_tcp_received_bytes_total": float64(bytes), "istio_tcp_sent_bytes_total": float64(bytes),
						"istio_tcp_connections_closed_total": closed,
					} {
						e.must(lab.Until(e.ctx, when, func() error { return is(e.sum(d, metric, labels...), want, metric+" of the "+reporter) }))
					}
				}
			}
			const size = 100_000
			text := strings.Repeat("culvert!", size/8)
			c := e.connect(tt.from, app.Addr(4))
			wants("nothing has moved", 0, 0) // the control
			e.must(exchange(c, text))
			wants("it is open", size, 0)
			e.must(exchange(c, text))
			wants("it is open still", 2*size, 0)
			e.must(c.CloseWrite())
			wants("it has ended", 2*size, 1)
		})
	}

	// A handshake that succeeds has a line at debug, at either end.
	one, two := e.Pod(1, 1), e.Pod(2, 1)
	for d, want := range map[*lab.Daemon]string{
		d[0]: "reporter=source workload=demo_" + one.Name + " peer=" + two.V4.String() + " expected=" + two.Identity() + " identity=" + two.Identity() + " duration=",
		d[1]: "reporter=destination workload=demo_" + two.Name + " peer=" + one.V4.String() + " identity=" + one.Identity() + " duration=",
	} {
		if log := d.LogTail(1000); strings.Count(log, `msg="handshake succeeded" `+want) != 1 {
			t.Errorf("%s does not say %q once:\n%s", d.Node.Name, want, log)
		}
	}
}

// is wants a number to be another.
func is(got, want float64, what string) error {
	if got != want {
		return fmt.Errorf("%s is %v, want %v", what, got, want)
	}
	return nil
}

// Who takes a daemon's lines and metrics, and does not: a reader that has stopped,
// a disk that is full, a scraper that never reads. Connections go on as on a quiet
// run beside it, and what is lost is counted.
func TestStuckReadersSlowNobody(t *testing.T) {
	const queue, times, knocks = 50, 200, 150
	dir := t.TempDir()
	out, errs := filepath.Join(dir, "out"), filepath.Join(dir, "err")
	binary := wrapped(t, "exec >>"+out+" 2>>"+errs)
	e := setup(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	e.startOn(e.Nodes[1], lab.DaemonConfig{})

	// pipes are read from by nobody, unless they are drained.
	pipes := func(t *testing.T, drained bool) {
		for _, path := range []string{out, errs} {
			e.must(unix.Mkfifo(path, 0o600))
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			e.must(err)
			t.Cleanup(func() { f.Close(); os.Remove(path) })
			if drained {
				go io.Copy(io.Discard, f) // until it is closed
				continue
			}
			raw, err := f.SyscallConn()
			e.must(err)
			e.must(raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, 4096) }))
		}
	}
	type numbers struct{ open, fresh time.Duration } // medians
	medians := map[string]numbers{}
	for _, tt := range []struct {
		name    string
		begin   func(t *testing.T)
		during  func(t *testing.T, d *lab.Daemon)
		dropped bool // lines of the access log
		lost    bool // and of the log
	}{
		{name: "quiet", begin: func(t *testing.T) { pipes(t, true) }},
		{name: "a reader that has stopped", begin: func(t *testing.T) { pipes(t, false) }, dropped: true},
		{name: "a full disk", begin: func(t *testing.T) {
			disk := filepath.Join(dir, "disk")
			e.must(os.Mkdir(disk, 0o700))
			e.must(unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16k"))
			e.must(os.WriteFile(filepath.Join(disk, "other"), make([]byte, 12<<10), 0o600)) // there is room for a page
			t.Cleanup(func() {
				if err := unix.Unmount(disk, 0); err != nil {
					t.Errorf("unmount the disk: %v", err)
				}
			})
			for _, path := range []string{out, errs} {
				e.must(os.Symlink(filepath.Join(disk, filepath.Base(path)), path))
				t.Cleanup(func() { os.Remove(path) })
			}
		}, dropped: true, lost: true},
		{name: "a scraper that never reads", begin: func(t *testing.T) { pipes(t, true) }, during: func(t *testing.T, d *lab.Daemon) {
			for range 2 { // as many as may be at it
				stuckScraper(t, e, d)
			}
			// From then on there may be no room for another scrape.
			e.must(lab.Until(e.ctx, "both are at it", func() error {
				if _, err := d.Metrics(e.ctx); err == nil || !strings.Contains(err.Error(), "503") {
					return fmt.Errorf("another scrape: %v", err)
				}
				return nil
			}))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := e.in(t)
			tt.begin(t)
			d, err := e.Nodes[0].LaunchDaemon(lab.DaemonConfig{Binary: binary, Pods: e.Nodes[0].Pods[:2], Workloads: e.enrolled(), Settings: map[string]any{
				"accessLog": map[string]any{"format": "json", "queue": queue},
				"log":       map[string]any{"format": "text", "level": "debug"},
			}})
			e.must(err)
			t.Cleanup(func() { // before its files go
				d.Signal(syscall.SIGCONT)
				if err := d.Close(); err != nil {
					t.Errorf("stop: %v", err)
				}
			})
			e.must(d.Ready(e.ctx))
			begun := time.Now()
			knock(e, e.Pod(1, 1), knocks)
			took := time.Since(begun) // 50 lines a second, from any instant on
			failed, unsaid := e.sum(d, "mtls_handshake_failure_total", "reason", "tls_protocol"), e.sum(d, "culvert_log_suppressed_total", "about", "peers")
			if failed != knocks || knocks-unsaid > 50*(2+took.Truncate(time.Second).Seconds()) {
				t.Errorf("%v bad peers are counted, of %d; %v of them have no line, in %v", failed, knocks, unsaid, took)
			}
			if tt.during != nil {
				tt.during(t, d)
			}

			r := e.rounds(e.Pod(1, 1), app.Addr(4))
			for range times {
				if err := r.round(); err != nil {
					t.Fatal(err)
				}
			}
			medians[tt.name] = numbers{median(r.open), median(r.fresh)}

			if tt.during == nil {
				ctx, cancel := context.WithTimeout(e.ctx, patience())
				defer cancel()
				e.must(lab.Until(ctx, "what is lost is counted", func() error {
					dropped, waiting, lost := e.sum(d, "culvert_access_log_dropped_total"), e.sum(d, "culvert_access_log_waiting_lines"), e.sum(d, "culvert_log_dropped_total")
					if dropped > 0 != tt.dropped || lost > 0 != tt.lost || waiting > queue {
						return fmt.Errorf("%v lines of the access log are dropped, %v wait, and %v of the log are dropped", dropped, waiting, lost)
					}
					return nil
				}))
			}
			if tt.name == "quiet" { // the control: what stops the daemon is noticed
				e.must(d.Signal(syscall.SIGSTOP))
				ctx, cancel := context.WithTimeout(e.ctx, patience())
				defer cancel()
				e.must(lab.Until(ctx, "control: a daemon that stands still is noticed", func() error {
					if err := r.round(); !isTimeout(err) { // its threads stop one by one
						return fmt.Errorf("a round: %v, want a timeout", err)
					}
					return nil
				}))
			}
		})
	}
	quiet := medians["quiet"]
	for name, m := range medians {
		t.Logf("%-28s a request on an open connection %v, a new connection with a request %v", name, m.open, m.fresh)
		if m.open > 5*quiet.open+10*time.Millisecond*lab.Slowness() || m.fresh > 5*quiet.fresh+10*time.Millisecond*lab.Slowness() {
			t.Errorf("%s: %v, and %v for a new connection; it is %v and %v where all is read", name, m.open, m.fresh, quiet.open, quiet.fresh)
		}
	}
}

// rounds measures what each takes.
type rounds struct {
	e           *env
	from        *lab.Pod
	to          netip.AddrPort
	c           *net.TCPConn // that is open all the time
	open, fresh []time.Duration
}

func (e *env) rounds(from *lab.Pod, to netip.AddrPort) *rounds {
	return &rounds{e: e, from: from, to: to, c: e.connect(from, to)}
}

// round is a request on the open connection, and a new one with a request. Neither
// may take longer than what blocks would.
func (r *rounds) round() error {
	const bound = 2 * time.Second
	begun := time.Now()
	_ = r.c.SetDeadline(begun.Add(bound * lab.Slowness()))
	if err := exchange(r.c, marker); err != nil {
		return fmt.Errorf("on the open connection: %w", err)
	}
	r.open = append(r.open, time.Since(begun))
	begun = time.Now()
	ctx, cancel := context.WithTimeout(r.e.ctx, bound*lab.Slowness())
	defer cancel()
	c, err := r.from.Dial(ctx, r.to)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer c.Close()
	_ = c.SetDeadline(begun.Add(bound * lab.Slowness()))
	if err := exchange(c, marker); err != nil {
		return fmt.Errorf("on a new connection: %w", err)
	}
	r.fresh = append(r.fresh, time.Since(begun))
	return nil
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// knock has so many bad peers come to a pod's tunnel from the other node.
func knock(e *env, to *lab.Pod, n int) {
	e.t.Helper()
	var wait sync.WaitGroup
	work := make(chan struct{}, n)
	for range n {
		work <- struct{}{}
	}
	close(work)
	for range 10 {
		wait.Go(func() {
			for range work {
				var c net.Conn
				err := e.Nodes[1].Do(func() (err error) {
					c, err = net.DialTimeout("tcp", netip.AddrPortFrom(to.V4, hbonePort).String(), 5*time.Second*lab.Slowness())
					return err
				})
				if err != nil {
					e.t.Errorf("knock: %v", err)
					return
				}
				_ = c.SetDeadline(time.Now().Add(5 * time.Second * lab.Slowness()))
				_, _ = io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
				_, _ = io.Copy(io.Discard, c) // an alert, and the end
				c.Close()
			}
		})
	}
	wait.Wait()
}

// stuckScraper asks for the metrics again and again, and reads none.
func stuckScraper(t *testing.T, e *env, d *lab.Daemon) {
	t.Helper()
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1024) })
	}}
	var c net.Conn
	e.must(d.Node.Do(func() (err error) {
		c, err = dialer.DialContext(e.ctx, "tcp", "127.0.0.1:15020")
		return err
	}))
	t.Cleanup(func() { c.Close() })
	go func() { // until it is closed: some are answered with a 503, which fills nothing
		for {
			if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n"); err != nil {
				return
			}
		}
	}()
}
