// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/admin"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// TestFramesFillRecords: a full DATA frame and its header are one full record.
func TestFramesFillRecords(t *testing.T) {
	userSpace(t)
	m := newPeerMesh(t, lab.DaemonConfig{})
	const (
		full   = 16375             // bytes of data
		record = full + 9 + 1 + 16 // with the frame's header, the inner type and the tag
	)
	var s *framed
	for _, n := range []int{full, full + 1} { // the control: a byte more is another frame
		c := m.connect(m.client, m.app(4))
		_, err := c.Write(make([]byte, n)) // before the 200: it is all there when that comes
		m.must(err)
		if s == nil {
			s = m.session()
		}
		before := s.records.of(record)
		id := s.request()
		// What else is to be sent is sent by the answer of a PING: the SETTINGS' ACK
		// would share the record.
		s.do(func() error { return s.fr.WritePing(false, [8]byte{1}) })
		s.next(http2.FramePing)
		s.respond(id, "200", false)
		var lengths []int
		for got := 0; got < n; {
			x := s.next(http2.FrameData)
			got += len(x.data)
			lengths = append(lengths, len(x.data))
		}
		if want := map[int][]int{full: {full}, full + 1: {full, 1}}[n]; !slices.Equal(lengths, want) {
			t.Errorf("%d bytes came in frames of %v, want %v", n, lengths, want)
		}
		if k := s.records.of(record) - before; k != 1 {
			t.Errorf("%d bytes came in %d full records, want 1", n, k)
		}
	}
}

// TestWindowGrows: a stream's receive window follows what its application takes.
func TestWindowGrows(t *testing.T) {
	userSpace(t)
	const total = 16 << 20
	// download sends as much as the windows allow, and returns the largest window
	// that the stream had, and how much it was.
	download := func(t *testing.T, read func(net.Conn)) (largest, sent int) {
		m := newPeerMesh(t, lab.DaemonConfig{})
		c := m.connect(m.client, m.app(4))
		s := m.session()
		stream := s.request()
		s.respond(stream, "200", false)
		go read(c)
		window := 65536 // as our SETTINGS say
		chunk := make([]byte, 16384)
		for sent < total {
			for window >= len(chunk) && 65535+int(s.given.Load())-sent >= len(chunk) && sent < total {
				s.do(func() error { return s.fr.WriteData(stream, false, chunk) })
				window, sent = window-len(chunk), sent+len(chunk)
			}
			x, ok := s.within(http2.FrameWindowUpdate, 2*quiet)
			if !ok {
				break
			}
			if x.StreamID == stream {
				window += x.grows
			}
			largest = max(largest, window)
		}
		return largest, sent
	}
	t.Run("drains", func(t *testing.T) {
		if largest, sent := download(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }); largest < 256<<10 || sent < total {
			t.Errorf("a window of %d bytes at most, %d of %d were sent", largest, sent, total)
		}
	})
	t.Run("control", func(t *testing.T) { // takes nothing but what the kernel's buffers do
		if _, sent := download(t, func(net.Conn) {}); sent >= total {
			t.Errorf("control: an application that takes nothing was sent %d bytes", sent)
		}
	})
}

// TestManyConnections: each of many is whole.
func TestManyConnections(t *testing.T) {
	userSpace(t)
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	const n = 8000
	data := make([]byte, 64<<10)
	_, _ = rand.Read(data)
	work := make(chan int, n)
	for i := range n {
		work <- i
	}
	close(work)
	changed := func(i int) bool { return i%1000 == 999 } // the control
	var all sync.WaitGroup
	var found atomic.Int32
	ctx, cancel := context.WithTimeout(context.Background(), scaled(time.Minute))
	defer cancel()
	for range 32 {
		all.Go(func() {
			for i := range work {
				from, family := e.Pod(1, 1+i%2), 4+i%4/2*2
				c, err := from.Dial(ctx, app.Addr(family))
				if err != nil {
					t.Error(err)
					return
				}
				_ = c.SetDeadline(time.Now().Add(patience()))
				sent := data[i%1000 : i%1000+1+i%3000]
				want := sha256.Sum256(sent)
				if changed(i) {
					sent = bytes.Clone(sent)
					sent[len(sent)/2] ^= 1
				}
				h := sha256.New()
				if _, err = c.Write(sent); err == nil {
					if err = c.CloseWrite(); err == nil {
						_, err = io.Copy(h, c)
					}
				}
				c.Close()
				if err != nil {
					t.Error(err)
					return
				}
				switch whole := bytes.Equal(h.Sum(nil), want[:]); {
				case changed(i):
					if !whole {
						found.Add(1)
					}
				case !whole:
					t.Errorf("connection %d: other bytes came back", i)
				}
			}
		})
	}
	all.Wait()
	if found.Load() != n/1000 {
		t.Errorf("control: of %d changed bytes %d were found", n/1000, found.Load())
	}
	ok := func(d *lab.Daemon, reporter string) float64 {
		return e.sum(d, "culvert_connections_closed_total", "reporter", reporter, "reason", "ok")
	}
	if err := lab.Until(ctx, "all are counted", func() error {
		if a, b := ok(d[0], "source"), ok(d[1], "destination"); a != n || b != n {
			return fmt.Errorf("%v and %v", a, b)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// TestNodePorts: what the daemon has on the node, beside the pods' ports.
func TestNodePorts(t *testing.T) {
	e := setup(t)
	n := e.Nodes[0]
	get := func(path string) (string, error) {
		var c net.Conn
		if err := n.Do(func() (err error) { c, err = net.DialTimeout("tcp", "127.0.0.1:15020", patience()); return err }); err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience()))
		if _, err := fmt.Fprintf(c, "GET %s HTTP/1.0\r\n\r\n", path); err != nil {
			return "", err
		}
		b, err := io.ReadAll(c)
		return string(b), err
	}
	if _, err := get("/metrics"); !isRefused(err) {
		t.Errorf("control: without a daemon: %v, want it refused", err)
	}
	e.start(lab.DaemonConfig{})
	for path, want := range map[string]string{"/healthz/ready": "200 OK", "/healthz/live": "200 OK", "/metrics": "culvert_build_info", "/other": "404"} {
		if got, err := get(path); err != nil || !strings.Contains(got, want) {
			t.Errorf("%s: %.100q, %v, want %q", path, got, err, want)
		}
	}
	info, err := os.Stat(admin.Socket(n.RunDir()))
	e.must(err)
	if info.Mode()&os.ModeSocket == 0 || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("the admin socket's mode is %v", info.Mode())
	}
	// Nothing of it can be reached from the pods, or from the other node.
	for _, from := range []*lab.Pod{e.Pod(1, 1), e.Pod(1, 3), e.Pod(2, 3)} {
		if _, err := e.dial(from, netip.AddrPortFrom(n.Addrs[0], 15020)); !isRefused(err) {
			t.Errorf("%s reaches the metrics of the node: %v", from.Name, err)
		}
	}
}
