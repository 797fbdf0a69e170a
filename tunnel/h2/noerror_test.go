// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"bytes"
	"testing"

	"golang.org/x/net/http2"
)

// RFC 9113, section 8.1: a reset with NO_ERROR behind the end of the peer's half
// takes nothing back of what the peer has sent.
func TestResetWithoutAnErrorKeepsWhatCameBefore(t *testing.T) {
	for _, frozen := range []bool{false, true} {
		c, _ := pair(t, Config{}, Config{})
		s, err := c.Open(connectFields(), nil)
		if err != nil {
			t.Fatal(err)
		}
		take(c)
		w := newScript(false)
		n := w.buf.Len()
		w.enc.SetMaxDynamicTableSize(0)
		w.headers(1, false, ":status", "200")
		must(w.fr.WriteData(1, true, []byte("all of it")))
		must(w.fr.WriteRSTStream(1, http2.ErrCodeNo))
		ev := receive(t, c, w.buf.Bytes()[n:])
		if k := kinds(ev); len(k) != 4 || k[1] != EventData || k[2] != EventEnd || k[3] != EventReset || ev[3].Code != http2.ErrCodeNo {
			t.Fatalf("events %v", k)
		}
		s.Enqueue(ev[1].Data)
		if !s.Closed() || s.Sendable() != 0 {
			t.Fatal("the stream is not closed")
		}
		if frozen {
			var all []*Stream
			if c, all = Thaw(c.Freeze()); len(all) != 1 {
				t.Fatalf("%d streams thawed", len(all))
			}
			s = all[0]
		}
		if got := bytes.Join(s.Queued(), nil); string(got) != "all of it" {
			t.Fatalf("queued %q", got)
		}
		s.Dequeue(9)
		c.Taken(s, 9)
		c.check(t)
		if len(c.streams) != 0 || c.CountStreams() != 0 || len(c.Control()) != 0 {
			t.Fatalf("%d streams left, control %q", len(c.streams), c.Control())
		}
	}
	// Any other reset takes it back, and so does this one in the middle.
	for _, tt := range []struct {
		end  bool
		code http2.ErrCode
	}{{true, http2.ErrCodeCancel}, {false, http2.ErrCodeNo}} {
		c, _ := pair(t, Config{}, Config{})
		s, err := c.Open(connectFields(), nil)
		if err != nil {
			t.Fatal(err)
		}
		w := newScript(false)
		n := w.buf.Len()
		w.enc.SetMaxDynamicTableSize(0)
		w.headers(1, false, ":status", "200")
		must(w.fr.WriteData(1, tt.end, []byte("all of it")))
		must(w.fr.WriteRSTStream(1, tt.code))
		ev := receive(t, c, w.buf.Bytes()[n:])
		s.Enqueue(ev[1].Data)
		if s.QueuedBytes() != 0 || len(c.streams) != 0 {
			t.Errorf("%+v: %d bytes queued after the reset", tt, s.QueuedBytes())
		}
	}
}
