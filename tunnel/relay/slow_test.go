// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// A peer that has us answer and never reads: what waits for it is bounded, and
// the session ends.
func TestAnswersThatAreNotRead(t *testing.T) {
	kinds := map[string]func(p *peer, i int) error{
		"ping": func(p *peer, _ int) error { return p.fr.WritePing(false, [8]byte{}) },
		"requests that are refused": func(p *peer, i int) error {
			p.hb.Reset()
			for _, f := range request("10.0.0.1:80") {
				_ = p.enc.WriteField(f)
			}
			return p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: p.hb.Bytes(), EndHeaders: true})
		},
	}
	for name, write := range kinds {
		t.Run(name, func(t *testing.T) {
			r := emptyRig(t, rigConfig{request: func(_ *relay.Worker, tr *relay.Trunk, st *h2.Stream, _ func() *relay.Relay) {
				_ = tr.Session().H2.Respond(st, []hpack.HeaderField{{Name: ":status", Value: "503"}}, true)
				tr.Session().H2.Reset(st, http2.ErrCodeNo)
				tr.Send()
			}})
			p := r.facing(false)
			p.enc.SetMaxDynamicTableSize(0)
			p.must(p.fr.WriteSettings())
			p.must(p.fr.WriteSettingsAck())
			done := make(chan struct{})
			go func() {
				defer close(done)
				for i := 0; ; i++ {
					if write(p, i) != nil {
						return
					}
				}
			}()
			e := r.trunkEnd()
			var ce *h2.ConnError
			if !errors.As(e.err, &ce) || ce.Code != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("the session ended with %v, want ENHANCE_YOUR_CALM", e.err)
			}
			p.conn.Close()
			<-done
		})
	}
}

// A peer that goes on sending and takes nothing is given up; one that reads a
// little now and then is not.
func TestPeerThatDoesNotRead(t *testing.T) {
	dead := 300 * time.Millisecond * lab.Slowness()
	for _, reads := range []bool{false, true} {
		r := emptyRig(t, rigConfig{server: relay.TrunkConfig{PingAfter: dead / 2, DeadAfter: dead}, serve: func(c net.Conn, _ string) {
			for b := make([]byte, 64<<10); ; {
				if _, err := c.Write(b); err != nil {
					return
				}
			}
		}})
		p := r.facing(false)
		p.settle(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
		p.must(p.fr.WriteWindowUpdate(0, 1<<30))
		p.headers(1, ":method", "CONNECT", ":authority", "10.0.0.1:80")
		stop := make(chan struct{})
		over := make(chan struct{})
		go func() { // it is alive
			defer close(over)
			for {
				select {
				case <-stop:
					return
				case <-time.After(dead / 10):
					_ = p.fr.WriteData(1, false, []byte("x"))
					if reads {
						_, _ = p.conn.Read(make([]byte, 1<<20))
					}
				}
			}
		}()
		select {
		case e := <-r.closed:
			if reads || !errors.Is(e.err, relay.ErrUnread) {
				t.Errorf("reads %v: the session ended with %v", reads, e.err)
			}
		case <-time.After(10 * dead):
			if !reads {
				t.Error("a peer that does not read is kept")
			}
		}
		close(stop)
		<-over
		if reads {
			on(r.server, func() { r.far.Close(relay.ErrIdle) })
		}
	}
}
