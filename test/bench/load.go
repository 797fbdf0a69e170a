// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A connection begins with a header that says what the server is to do with
// it: one byte of mode, three of nothing, the size of a message in four.
const (
	modeEcho   = 'e' // answer each message with one of the same size
	modeSink   = 's' // read until the end
	modeSource = 'd' // write until the client has enough
	headerLen  = 8
	bulkBuf    = 256 << 10 // bytes of one read or write in bulk
)

func header(mode byte, size int) []byte {
	return binary.BigEndian.AppendUint32([]byte{mode, 0, 0, 0}, uint32(size))
}

// result is what a load prints.
type result struct {
	Ops     int           `json:"ops"`
	Bytes   int64         `json:"bytes"`
	Elapsed time.Duration `json:"elapsed"`
	P50     time.Duration `json:"p50"`
	P99     time.Duration `json:"p99"`
}

// ports is how many ports the server listens on, from port on. Connections
// that come and go use them in turn: to one of them alone the client would run
// out of its own ports, and measure that.
const ports = 32

// serveMain is the server's process: it says when it is ready, and serves until
// its standard input ends.
func serveMain() error {
	failed := make(chan error, ports)
	for i := range ports {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port+i))
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go serveConn(c.(*net.TCPConn))
			}
		}()
	}
	fmt.Println("ready")
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); os.Exit(0) }()
	return <-failed
}

func serveConn(c *net.TCPConn) {
	defer c.Close()
	var h [headerLen]byte
	if _, err := io.ReadFull(c, h[:]); err != nil {
		return
	}
	size := int(binary.BigEndian.Uint32(h[4:]))
	switch h[0] {
	case modeEcho:
		buf := make([]byte, size)
		for {
			if _, err := io.ReadFull(c, buf); err != nil {
				return
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	case modeSink:
		buf := make([]byte, bulkBuf)
		for {
			if _, err := c.Read(buf); err != nil {
				return
			}
		}
	case modeSource:
		buf := make([]byte, bulkBuf)
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}
}

// load is one kind of work.
type load struct {
	Mode    byte
	Conns   int
	Size    int
	Churn   bool // a connection per message
	For     time.Duration
	Idle    bool   // open the connections, exchange once, hold them until stdin ends
	Message string // what is sent, in place of zeros
	Rate    int    // messages a second over all connections, answered or not; 0: each after the last one's answer
}

// loadMain is the client's process.
func loadMain(args []string) error {
	f := flag.NewFlagSet("load", flag.ContinueOnError)
	addr := f.String("addr", "", "server")
	spec := f.String("spec", "", "load as JSON")
	if err := f.Parse(args); err != nil {
		return err
	}
	var l load
	if err := json.Unmarshal([]byte(*spec), &l); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(*addr)
	if err != nil {
		return err
	}
	r, err := l.run(to)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func (l load) run(addr netip.AddrPort) (result, error) {
	workers := make([]*worker, l.Conns)
	var failed atomic.Pointer[error]
	var all sync.WaitGroup
	for i := range workers {
		workers[i] = &worker{load: l, addr: addr}
		if l.Rate > 0 {
			workers[i].due = make(chan time.Time, maxDue)
		}
		if !l.Churn {
			if err := workers[i].open(); err != nil {
				return result{}, fmt.Errorf("connection %d: %w", i+1, err)
			}
		}
	}
	if l.Idle {
		fmt.Println("open")
		_, _ = io.Copy(io.Discard, os.Stdin)
		return result{}, nil
	}
	start := time.Now()
	end := start.Add(l.For)
	if l.Rate > 0 {
		all.Go(func() {
			if err := pace(workers, l.Rate, start, end); err != nil {
				failed.Store(&err)
			}
		})
	}
	for _, w := range workers {
		all.Go(func() {
			if err := w.work(end); err != nil {
				failed.Store(&err)
			}
		})
	}
	all.Wait()
	if err := failed.Load(); err != nil {
		return result{}, *err
	}
	r := result{Elapsed: time.Since(start)}
	var lat []time.Duration
	for _, w := range workers {
		r.Ops += w.ops
		r.Bytes += w.bytes
		lat = append(lat, w.lat...)
		if w.c != nil {
			w.c.Close()
		}
	}
	if len(lat) > 0 {
		slices.Sort(lat)
		r.P50, r.P99 = lat[len(lat)/2], lat[len(lat)*99/100]
	}
	return r, nil
}

type worker struct {
	load
	addr  netip.AddrPort
	c     *net.TCPConn
	buf   []byte
	ops   int
	bytes int64
	lat   []time.Duration
	due   chan time.Time // when the messages were to be sent, at a fixed rate
}

// maxDue is how many messages of a connection wait for their answers at a fixed rate.
const maxDue = 1 << 12

// pace sends messages over the connections in turn, each when it is due. What
// is late is sent at once: a message's time counts from when it was due, or a
// path that stands still would not be asked meanwhile, and look better for it.
func pace(workers []*worker, rate int, start, end time.Time) error {
	defer func() {
		for _, w := range workers {
			close(w.due)
		}
	}()
	// Go's own timers are a millisecond apart where nothing else happens.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return err
	}
	message := make([]byte, workers[0].Size)
	for i := 0; ; i++ {
		due := start.Add(time.Duration(i) * time.Second / time.Duration(rate))
		if !due.Before(end) {
			return nil
		}
		for wait := time.Until(due); wait > 0; wait = time.Until(due) {
			ts := unix.NsecToTimespec(int64(wait))
			if err := unix.Nanosleep(&ts, nil); err != nil && err != unix.EINTR {
				return err
			}
		}
		w := workers[i%len(workers)]
		select {
		case w.due <- due:
		default:
			return fmt.Errorf("%d messages of a connection wait for their answers: the path cannot do %d a second", maxDue, rate)
		}
		if _, err := w.c.Write(message); err != nil {
			return err
		}
	}
}

func (w *worker) open() error {
	to := w.addr
	if w.Churn {
		to = netip.AddrPortFrom(to.Addr(), to.Port()+uint16(w.ops%ports))
	}
	c, err := net.Dial("tcp", to.String())
	if err != nil {
		return err
	}
	w.c = c.(*net.TCPConn)
	if _, err := w.c.Write(header(w.Mode, w.Size)); err != nil {
		return err
	}
	if w.Mode != modeEcho {
		return nil
	}
	if w.Churn {
		return w.exchange()
	}
	// A path that takes no more connections is to say so, not to hang.
	if err := w.c.SetDeadline(time.Now().Add(stalled)); err != nil {
		return err
	}
	if err := w.exchange(); err != nil {
		return err
	}
	return w.c.SetDeadline(time.Time{})
}

// stalled is after how long a connection that is opened and not answered has failed.
const stalled = 30 * time.Second

func (w *worker) exchange() error {
	if w.buf == nil {
		w.buf = make([]byte, w.Size)
		copy(w.buf, w.Message)
	}
	if _, err := w.c.Write(w.buf); err != nil {
		return err
	}
	_, err := io.ReadFull(w.c, w.buf)
	return err
}

func (w *worker) work(end time.Time) error {
	switch {
	case w.Rate > 0:
		for due := range w.due {
			if _, err := io.ReadFull(w.c, w.buf); err != nil {
				return fmt.Errorf("after %d operations: %w", w.ops, err)
			}
			w.lat = append(w.lat, time.Since(due))
			w.ops++
			w.bytes += int64(2 * w.Size)
		}
		return nil
	case w.Mode == modeEcho:
		for time.Now().Before(end) {
			t := time.Now()
			var err error
			if w.Churn {
				if err = w.open(); err == nil {
					err = w.c.Close()
				}
			} else {
				err = w.exchange()
			}
			if err != nil {
				return fmt.Errorf("after %d operations: %w", w.ops, err)
			}
			w.lat = append(w.lat, time.Since(t))
			w.ops++
			w.bytes += int64(2 * w.Size)
		}
		return nil
	case w.Mode == modeSink:
		buf := make([]byte, bulkBuf)
		for time.Now().Before(end) {
			n, err := w.c.Write(buf)
			w.bytes += int64(n)
			if err != nil {
				return err
			}
		}
		return nil
	case w.Mode == modeSource:
		buf := make([]byte, bulkBuf)
		for time.Now().Before(end) {
			n, err := w.c.Read(buf)
			w.bytes += int64(n)
			if err != nil {
				return err
			}
		}
		return w.c.SetLinger(0)
	}
	return errors.New("unknown mode")
}
