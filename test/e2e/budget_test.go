// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// TestWindowBudget: a peer fills the windows of streams whose applications take
// nothing. Above its part of the node's memory the streams are reset; what
// drains, and everybody else, does not notice.
func TestWindowBudget(t *testing.T) {
	userSpace(t)
	const memory = 8                         // MiB, of which half may be queued
	const part = float64(memory<<20) / 2 / 4 // and a quarter of that of one peer
	e := setup(t)
	d := e.start(lab.DaemonConfig{Settings: map[string]any{"tunnel": map[string]any{"memory": memory}}})[1]
	stranger, server := e.Pod(1, 3), e.Pod(2, 1)
	svid := e.svid(e.authority(), stranger.Identity())
	echo, err := server.Echo(8080)
	e.must(err)
	over := make(chan struct{})
	defer close(over)
	deaf, err := server.Serve(8081, func(*net.TCPConn) { <-over })
	e.must(err)
	queued := func() float64 { return e.sum(d, "culvert_peer_memory_bytes", "use", "queued") }

	for _, tc := range []struct {
		streams int
		above   bool
	}{{2, false}, {32, true}} {
		t.Run(fmt.Sprint(tc.streams), func(t *testing.T) {
			e := e.in(t)
			s, err := e.session(stranger, server.Addr(4), peerTLS(svid))
			e.must(err)
			defer s.NetConn().Close()
			a, err := s.connect("before", echo.Addr(4))
			e.must(err)
			e.must(s.expect(a.stream, "before"))

			watch := e.watch(d)
			_ = s.NetConn().SetDeadline(time.Now().Add(6 * patience()))
			reset := s.fill(tc.streams, deaf.Addr(4).String(), quiet*lab.Slowness())
			counted := e.sum(d, "culvert_peer_limits_total", "limit", "queued") - watch.before.Sum("culvert_peer_limits_total", "limit", "queued")
			if (len(reset) > 0) != tc.above || counted != float64(len(reset)) {
				t.Errorf("%d streams are reset, %v counted", len(reset), counted)
			}
			for id, code := range reset {
				if code != http2.ErrCodeEnhanceYourCalm {
					t.Errorf("stream %d is reset with %v", id, code)
				}
			}
			if n := queued(); n > part || n < part/16 {
				t.Errorf("%v bytes are queued, at most %v may be", n, part)
			}
			if tc.above {
				_, err := d.WaitAccessLog(e.ctx, len(reset), func(l lab.Entry) bool {
					return l.String("direction") == "inbound" && l.String("dst.addr") == deaf.Addr(4).String() && l.String("reason") == "limit"
				})
				e.must(err)
			}
			e.must(s.WriteData(a.stream, false, []byte("after")))
			e.must(s.expect(a.stream, "after"))
			e.must(e.try(e.Pod(1, 1), echo.Addr(4)))

			s.NetConn().Close()
			e.must(lab.Until(e.ctx, "what was queued is given back", func() error {
				if n := queued(); n != 0 {
					return fmt.Errorf("%v bytes are queued", n)
				}
				return nil
			}))
		})
	}
}

// fill opens streams and sends into all of them what their windows let it, until
// nothing has moved for a while. It returns which of them were reset, and how.
func (s *peerSession) fill(streams int, authority string, rest time.Duration) map[uint32]http2.ErrCode {
	var mu sync.Mutex // guards what follows
	windows := map[uint32]int{}
	reset := map[uint32]http2.ErrCode{}
	conn := 32 << 20 // of the 64 MiB that the session began with and others may have used
	moved := time.Now()
	for range streams {
		s.block.Reset()
		_ = s.enc.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"})
		_ = s.enc.WriteField(hpack.HeaderField{Name: ":authority", Value: authority})
		_ = s.WriteHeaders(http2.HeadersFrameParam{StreamID: s.next, BlockFragment: s.block.Bytes(), EndHeaders: true})
		windows[s.next] = 65535
		s.next += 2
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			f, err := s.ReadFrame()
			if err != nil {
				return
			}
			mu.Lock()
			switch f := f.(type) {
			case *http2.WindowUpdateFrame:
				moved = time.Now()
				if f.StreamID == 0 {
					conn += int(f.Increment)
				} else if _, ok := windows[f.StreamID]; ok {
					windows[f.StreamID] += int(f.Increment)
				}
			case *http2.RSTStreamFrame:
				moved = time.Now()
				reset[f.StreamID] = f.ErrCode
				delete(windows, f.StreamID)
			case *http2.PingFrame:
				if f.IsAck() && f.Data == [8]byte{'e', 'n', 'd'} {
					mu.Unlock()
					return
				}
			}
			mu.Unlock()
		}
	}()
	for {
		mu.Lock()
		id, n := uint32(0), 0
		for i, w := range windows {
			if w > 0 && conn > 0 {
				id, n = i, min(w, conn, 16<<10)
				windows[i] -= n
				conn -= n
				moved = time.Now()
				break
			}
		}
		over := time.Since(moved) > rest
		mu.Unlock()
		if over {
			break
		}
		if n == 0 {
			time.Sleep(time.Millisecond)
			continue
		}
		_ = s.WriteData(id, false, make([]byte, n))
		mu.Lock()
		moved = time.Now() // it may have waited for the peer
		mu.Unlock()
	}
	_ = s.WritePing(false, [8]byte{'e', 'n', 'd'})
	<-done
	return reset
}
