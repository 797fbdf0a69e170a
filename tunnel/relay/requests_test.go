// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"io"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// One peer's many requests do not keep another's one waiting, in either order,
// and each is taken up, also one that was taken back: its end is told.
func TestRequestsOfOnePeerDoNotDelayAnothers(t *testing.T) {
	const many = 500
	var all, before atomic.Int64
	var lone atomic.Pointer[relay.Trunk]
	r := emptyRig(t, rigConfig{request: func(_ *relay.Worker, tr *relay.Trunk, st *h2.Stream, _ func() *relay.Relay) {
		n := all.Add(1)
		if tr == lone.Load() {
			before.Store(n)
		}
		tr.Session().H2.Reset(st, http2.ErrCodeCancel)
	}})
	w := r.worker()
	crowd := r.facingOn(w, false)
	crowd.settle()
	one := r.facingOn(w, false)
	lone.Store(r.far)
	one.settle()
	for _, p := range []*peer{crowd, one} {
		p.enc.SetMaxDynamicTableSize(0)
	}
	release := hold(w)
	t.Cleanup(release)
	for i := range many {
		crowd.headers(uint32(2*i+1), ":method", "CONNECT", ":authority", "10.0.0.1:80")
	}
	one.headers(1, ":method", "CONNECT", ":authority", "10.0.0.1:80")
	release()
	wait(t, w, "all requests are taken up", func() bool { return all.Load() == many+1 })
	if n := before.Load(); n == 0 || n > 3*relay.RequestShare {
		t.Errorf("the lone request was the %dth to be taken up", n)
	}
}

// A session whose frames are small is read by one record in a turn, also the first
// time: what comes on another one meanwhile does not wait for all of them. One that
// has sent large frames is read by more, until it sends small ones.
func TestSmallFramesOfOnePeerDoNotDelayAnothers(t *testing.T) {
	const records, pings = 3, record.MaxPlaintext / 17
	var before atomic.Uint64
	var lone, crowded atomic.Pointer[relay.Trunk]
	r := emptyRig(t, rigConfig{request: func(_ *relay.Worker, tr *relay.Trunk, st *h2.Stream, _ func() *relay.Relay) {
		if tr == lone.Load() {
			before.Store(crowded.Load().Session().H2.Frames())
		}
		tr.Session().H2.Reset(st, http2.ErrCodeCancel)
	}})
	w := r.worker()
	crowd := r.facingOn(w, false)
	crowded.Store(r.far)
	crowd.settle()
	one := r.facingOn(w, false)
	lone.Store(r.far)
	one.settle()
	one.enc.SetMaxDynamicTableSize(0)
	go func() { _, _ = io.Copy(io.Discard, crowd.conn) }() // it reads its answers
	flood := func(id uint32) (handled uint64) {
		t.Helper()
		before.Store(0)
		release := hold(w)
		t.Cleanup(release)
		begun := crowded.Load().Session().H2.Frames() // the loop is held
		ping := append([]byte{0, 0, 8, byte(http2.FramePing), 0, 0, 0, 0, 0}, make([]byte, 8)...)
		for range records {
			_, err := crowd.rc.Write(bytes.Repeat(ping, pings))
			crowd.must(err)
		}
		one.headers(id, ":method", "CONNECT", ":authority", "10.0.0.1:80")
		release()
		wait(t, w, "the lone request is taken up", func() bool { return before.Load() > 0 })
		wait(t, w, "all frames are read", func() bool { return crowded.Load().Session().H2.Frames()-begun == records*pings })
		return before.Load() - begun
	}
	if n := flood(1); n > pings {
		t.Errorf("%d frames came before the lone request, a record holds %d", n, pings)
	}
	if n := flood(3); n > pings {
		t.Errorf("%d frames came before the second lone request, a record holds %d", n, pings)
	}
	// The control: with few frames in a read there is no such bound.
	on(w, func() { crowded.Load().ReadBy(records * record.SlotLen) })
	if n := flood(5); n != records*pings {
		t.Errorf("control: %d frames came before the lone request, want %d", n, records*pings)
	}
	if n := flood(7); n > pings {
		t.Errorf("%d frames came before the lone request, a record holds %d", n, pings)
	}
}

// What a read may take grows with full reads of few frames, up to the whole buffer.
func TestReadsGrow(t *testing.T) {
	for _, tt := range []struct {
		name            string
		room, n, frames int
		want            int
	}{
		{"few frames, not full", relay.LeastRead, relay.LeastRead - 1, 1, relay.LeastRead},
		{"few frames, full", relay.LeastRead, relay.LeastRead, relay.FrameShare, 2 * relay.LeastRead},
		{"one frame too many", 4 * relay.LeastRead, 4 * relay.LeastRead, relay.FrameShare + 1, relay.LeastRead},
		{"the whole buffer", relay.WholeRead, relay.WholeRead, 1, relay.WholeRead},
		{"nearly", relay.WholeRead - 1, relay.WholeRead - 1, 1, relay.WholeRead},
	} {
		if got := relay.NextRead(tt.room, tt.n, uint64(tt.frames)); got != tt.want {
			t.Errorf("%s: %d bytes, want %d", tt.name, got, tt.want)
		}
	}
}

// A peer that asks for much and is gone before it is answered ends its trunk, and
// stops nobody else's.
func TestRequestsOfAPeerThatIsGone(t *testing.T) {
	r := emptyRig(t, rigConfig{request: func(_ *relay.Worker, tr *relay.Trunk, st *h2.Stream, _ func() *relay.Relay) {
		_ = tr.Session().H2.Respond(st, []hpack.HeaderField{{Name: ":status", Value: "503"}}, true)
		tr.Session().H2.Reset(st, http2.ErrCodeNo)
	}})
	w := r.worker()
	for range 20 {
		p := r.facingOn(w, false)
		p.settle()
		p.enc.SetMaxDynamicTableSize(0)
		for i := range 4 * relay.RequestShare {
			p.headers(uint32(2*i+1), ":method", "CONNECT", ":authority", "10.0.0.1:80")
		}
		_ = p.conn.CloseRead()
		p.conn.Close()
		r.trunkEnd()
	}
}
