// SPDX-License-Identifier: Apache-2.0

package session_test

import (
	"crypto/tls"
	"fmt"
	"testing"

	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

// BenchmarkSession is data of one stream from one session to the other: frame,
// seal, open, events, and the window updates on the way back, without sockets.
func BenchmarkSession(b *testing.B) {
	for _, size := range []int{64, 1024, record.MaxPlaintext - h2.FrameHeaderLen} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			w := newWorld(1)
			w.join(tls.TLS_AES_128_GCM_SHA256)
			client, server := w.ends[0], w.ends[1]
			var far *h2.Stream // the server's end
			// pass seals what the slot holds and what control frames there are, and has
			// the other side take all of it.
			pass := func(from, to *side, used int) {
				for {
					used += from.s.FillControl(from.slot[:], used)
					if used == 0 {
						return
					}
					sealed := from.s.Records.Seal(from.slot[:], used)
					_, events, err := to.s.Next(from.slot[:sealed])
					if err != nil {
						b.Fatal(err)
					}
					for i := range events {
						switch e := &events[i]; e.Kind {
						case h2.EventHeaders:
							far = e.Stream
						case h2.EventData:
							to.s.H2.Taken(e.Stream, len(e.Data))
						}
					}
					used = 0
				}
			}
			st, err := client.s.H2.Open([]hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "10.0.0.1:80"}}, nil)
			if err != nil {
				b.Fatal(err)
			}
			pass(client, server, 0)
			if err := server.s.H2.Respond(far, []hpack.HeaderField{{Name: ":status", Value: "200"}}, false); err != nil {
				b.Fatal(err)
			}
			pass(server, client, 0)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if st.Sendable() < size {
					b.Fatalf("a window of %d bytes is left", st.Sendable())
				}
				client.s.H2.PutData(client.slot[record.HeaderLen:], st, size, false)
				pass(client, server, h2.FrameHeaderLen+size)
				pass(server, client, 0)
			}
		})
	}
}
