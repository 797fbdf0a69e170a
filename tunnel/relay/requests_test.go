// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/tunnel/h2"
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
		crowd.headers(uint32(2*i+1), false, ":method", "CONNECT", ":authority", "10.0.0.1:80")
	}
	one.headers(1, false, ":method", "CONNECT", ":authority", "10.0.0.1:80")
	release()
	wait(t, w, "all requests are taken up", func() bool { return all.Load() == many+1 })
	if n := before.Load(); n == 0 || n > 3*relay.RequestShare {
		t.Errorf("the lone request was the %dth to be taken up", n)
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
			p.headers(uint32(2*i+1), false, ":method", "CONNECT", ":authority", "10.0.0.1:80")
		}
		_ = p.conn.CloseRead()
		p.conn.Close()
		r.trunkEnd()
	}
}
