// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Every bound, at its limit and one above it. n frames or bytes are asked of
// do; limit passes, limit+1 does not.
func TestBounds(t *testing.T) {
	// list is a header list of n bytes as RFC 9113, section 6.5.2 counts.
	list := func(n int) []string {
		n -= len(":method") + len("CONNECT") + 32 + len("x") + 32
		return []string{":method", "CONNECT", "x", strings.Repeat("e", n)}
	}
	tests := []struct {
		name  string
		cfg   Config
		limit int
		do    func(w *script, n int)
		want  string // one above
	}{
		{"MaxDataFrame", Config{InitialWindow: maxWindow}, MaxDataFrame, func(w *script, n int) {
			w.connect(1)
			w.raw(n, http2.FrameData, 0, 1, strings.Repeat("x", n))
		}, "FRAME_SIZE_ERROR"},
		{"MaxDataFrame of an unknown type", Config{}, MaxDataFrame, func(w *script, n int) {
			w.raw(n, 0xbe, 0, 1, strings.Repeat("x", n))
		}, "FRAME_SIZE_ERROR"},
		{"MaxOtherFrame", Config{}, MaxOtherFrame, func(w *script, n int) {
			w.raw(n, http2.FrameGoAway, 0, 0, strings.Repeat("\x00", n))
		}, "FRAME_SIZE_ERROR"},
		{"header list", Config{}, DefaultMaxHeaderBytes, func(w *script, n int) {
			w.headers(1, false, list(n)...)
		}, "stream 1 ENHANCE_YOUR_CALM"},
		{"header list by config", Config{MaxHeaderBytes: 300}, 300, func(w *script, n int) {
			w.headers(1, false, list(n)...)
		}, "stream 1 ENHANCE_YOUR_CALM"},
		{"header block", Config{MaxHeaderBytes: 300}, 300, func(w *script, n int) {
			// Size updates are in no list.
			b := w.block(":method", "CONNECT")
			w.raw(n, http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, strings.Repeat("\x20", n-len(b))+string(b))
		}, "ENHANCE_YOUR_CALM"},
		{"header block in pieces", Config{MaxHeaderBytes: 300}, 300, func(w *script, n int) {
			b := w.block(":method", "CONNECT")
			b = append(bytes.Repeat([]byte("\x20"), n-len(b)), b...)
			must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:100]}))
			must(w.fr.WriteContinuation(1, false, b[100:250]))
			must(w.fr.WriteContinuation(1, true, b[250:]))
		}, "ENHANCE_YOUR_CALM"},
		{"header block, its beginning", Config{MaxHeaderBytes: 300}, 300, func(w *script, n int) {
			must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: make([]byte, n)}))
		}, "ENHANCE_YOUR_CALM"},
		{"string of a header", Config{MaxHeaderBytes: 300}, 300, func(w *script, n int) {
			// The list is too large either way, the string only above.
			w.headers(1, false, ":method", "CONNECT", "x", strings.Repeat("e", n))
		}, "COMPRESSION_ERROR"},
		{"maxContinuations", Config{}, maxContinuations, func(w *script, n int) {
			must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: w.block(":method", "CONNECT")}))
			for i := range n {
				must(w.fr.WriteContinuation(1, i == maxContinuations-1, nil))
			}
		}, "PROTOCOL_ERROR"}, // the last is one without HEADERS
		{"maxContinuations without end", Config{}, maxContinuations, func(w *script, n int) {
			must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1}))
			for range n {
				must(w.fr.WriteContinuation(1, false, nil))
			}
		}, "ENHANCE_YOUR_CALM"},
		{"MaxConcurrentStreams", Config{}, DefaultMaxStreams, func(w *script, n int) {
			for i := range n {
				w.connect(uint32(2*i + 1))
			}
		}, "stream 2001 REFUSED_STREAM"},
		{"MaxConcurrentStreams by config", Config{MaxConcurrentStreams: 3}, 3, func(w *script, n int) {
			for i := range n {
				w.connect(uint32(2*i + 1))
			}
		}, "stream 7 REFUSED_STREAM"},
		{"resets", Config{}, maxBudget, func(w *script, n int) {
			for i := range n {
				w.connect(uint32(2*i + 1))
				must(w.fr.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel))
			}
		}, "ENHANCE_YOUR_CALM"},
		{"empty DATA", Config{}, maxBudget, func(w *script, n int) {
			w.connect(1)
			for range n {
				must(w.fr.WriteData(1, false, nil))
			}
		}, "ENHANCE_YOUR_CALM"},
		{"padding alone", Config{}, maxBudget, func(w *script, n int) {
			w.connect(1)
			for range n {
				must(w.fr.WriteDataPadded(1, false, nil, []byte{0}))
			}
		}, "ENHANCE_YOUR_CALM"},
		{"PRIORITY", Config{}, maxBudget, func(w *script, n int) {
			for range n {
				must(w.fr.WritePriority(1, http2.PriorityParam{Weight: 1}))
			}
		}, "ENHANCE_YOUR_CALM"},
		{"unknown frames", Config{}, maxBudget, func(w *script, n int) {
			for range n {
				w.raw(1, 0xbe, 0, 0, "x")
			}
		}, "ENHANCE_YOUR_CALM"},
		{"WINDOW_UPDATE", Config{}, maxBudget, func(w *script, n int) {
			for range n {
				must(w.fr.WriteWindowUpdate(0, 1))
			}
		}, "ENHANCE_YOUR_CALM"},
		{"maxFields", Config{}, maxFields, func(w *script, n int) {
			all := []string{":method", "CONNECT"}
			for range n - 1 {
				all = append(all, "a", "b")
			}
			w.headers(1, false, all...)
		}, "stream 1 ENHANCE_YOUR_CALM"},
		{"SETTINGS", Config{}, maxBudget, func(w *script, n int) {
			for range n {
				must(w.fr.WriteSettings())
			}
		}, "ENHANCE_YOUR_CALM"},
		{"GOAWAY", Config{}, maxBudget, func(w *script, n int) {
			for range n {
				must(w.fr.WriteGoAway(0, 0, nil))
			}
		}, "ENHANCE_YOUR_CALM"},
		{"acknowledgements of nothing", Config{}, maxBudget, func(w *script, n int) {
			for i := range n {
				if i%2 == 0 {
					must(w.fr.WriteSettingsAck())
				} else {
					must(w.fr.WritePing(true, [8]byte{}))
				}
			}
		}, "ENHANCE_YOUR_CALM"},
		{"late frames of no stream", Config{}, maxBudget - 1, func(w *script, n int) {
			w.connect(1)
			must(w.fr.WriteRSTStream(1, 0)) // it has nothing in flight then
			for i := range n {
				switch i % 3 {
				case 0:
					w.headers(1, false, "a", "b")
				case 1:
					must(w.fr.WriteRSTStream(1, 0))
				default:
					must(w.fr.WriteData(1, false, []byte("x")))
				}
			}
		}, "ENHANCE_YOUR_CALM"},
		{"PING unread", Config{}, maxReplies / 17, func(w *script, n int) {
			for range n {
				must(w.fr.WritePing(false, [8]byte{}))
			}
		}, "ENHANCE_YOUR_CALM"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for n, want := range map[int]string{tt.limit: "ok", tt.limit + 1: tt.want} {
				if tt.name == "string of a header" && n == tt.limit {
					want = "stream 1 ENHANCE_YOUR_CALM"
				}
				w := newScript(true)
				w.enc.SetMaxDynamicTableSize(0)
				tt.do(w, n)
				c := New(tt.cfg)
				take(c)
				c.replies = 0
				if tt.name == "PING unread" {
					c.replies -= FrameHeaderLen // the acknowledgement of SETTINGS
				}
				_, err := c.Receive(w.buf.Bytes())
				if got := outcome(c, err); got != want {
					t.Errorf("%d: %s, want %s (%v)", n, got, want, err)
				}
			}
		})
	}
}

// The table that a peer may use before it has acknowledged our SETTINGS, and after.
func TestTableSize(t *testing.T) {
	for _, tt := range []struct {
		acknowledged bool
		size         uint64
		ok           bool
	}{
		{false, defaultTableSize, true},
		{false, defaultTableSize + 1, false},
		{true, 0, true},
		{true, 1, false},
	} {
		var b bytes.Buffer
		b.WriteString(http2.ClientPreface)
		fr := http2.NewFramer(&b, nil)
		must(fr.WriteSettings())
		if tt.acknowledged {
			must(fr.WriteSettingsAck())
		}
		block := []byte{0x20 | byte(tt.size)} // RFC 7541, section 6.3
		if tt.size >= 31 {
			block = append([]byte{0x3f}, binary.AppendUvarint(nil, tt.size-31)...)
		}
		block = append(block, 0x82) // :method GET
		must(fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true}))
		s := New(Config{})
		_, err := s.Receive(b.Bytes())
		var broken *ConnError
		if (err == nil) != tt.ok || err != nil && (!errors.As(err, &broken) || broken.Code != http2.ErrCodeCompression) {
			t.Errorf("acknowledged %v, %d bytes: %v", tt.acknowledged, tt.size, err)
		}
	}
}

// Refill and useful frames give the budget back.
func TestBudgetComesBack(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	empty := appendFrameHeader(nil, 0, http2.FrameData, 0, 1)
	for range maxBudget {
		receive(t, s, empty)
	}
	s.Refill()
	for range maxBudget {
		receive(t, s, empty)
	}
	if s.budget != 0 {
		t.Fatal(s.budget)
	}
	receive(t, s, frameData(c, cs, make([]byte, earnBytes-1), false))
	if s.budget != 0 {
		t.Fatal(s.budget)
	}
	receive(t, s, frameData(c, cs, make([]byte, 1+2*earnBytes), false))
	if s.budget != 3 {
		t.Fatal(s.budget)
	}
	// Streams that were accepted are useful, those that were not are not.
	for id := uint32(3); id < 203; id += 2 {
		other, ok := another(t, c, s)
		_ = ok
		receive(t, s, appendReset(nil, other.id, http2.ErrCodeCancel))
		receive(t, c, appendReset(nil, other.id, http2.ErrCodeCancel))
	}
	if s.budget != 3 {
		t.Fatal(s.budget)
	}
	_ = ss
}

// A peer that reads replies is not charged for them.
func TestPingsThatAreRead(t *testing.T) {
	_, s := pair(t, Config{}, Config{})
	for range 3 * maxReplies / 17 {
		receive(t, s, append(appendFrameHeader(nil, 8, http2.FramePing, 0, 0), make([]byte, 8)...))
		take(s)
	}
	// Half read is half forgiven.
	for range maxReplies / 17 {
		receive(t, s, append(appendFrameHeader(nil, 8, http2.FramePing, 0, 0), make([]byte, 8)...))
	}
	s.ConsumeControl(len(s.Control()) / 2)
	for range maxReplies / 17 / 2 {
		receive(t, s, append(appendFrameHeader(nil, 8, http2.FramePing, 0, 0), make([]byte, 8)...))
	}
}

// Window updates for a peer that sends and never reads are bounded too, though
// it is the application that causes them.
func TestUpdatesUnread(t *testing.T) {
	_, s := pair(t, Config{}, Config{})
	w := newScript(true)
	w.buf.Reset()
	w.enc.SetMaxDynamicTableSize(0)
	w.connect(1)
	ss := receive(t, s, w.buf.Bytes())[0].Stream
	piece := append(appendFrameHeader(nil, DefaultWindow/4, http2.FrameData, 0, 1), make([]byte, DefaultWindow/4)...)
	for range maxReplies {
		ev, err := s.Receive(piece)
		if err != nil {
			if s.err.Code != http2.ErrCodeEnhanceYourCalm || len(s.Control()) > 2*maxReplies {
				t.Fatalf("%v with %d bytes queued", err, len(s.Control()))
			}
			return
		}
		s.Taken(ss, len(ev[0].Data))
	}
	t.Fatalf("%d bytes queued", len(s.Control()))
}

// Answers that nobody reads stop further requests.
func TestAnswersUnread(t *testing.T) {
	s := New(Config{})
	take(s)
	w := newScript(true)
	w.enc.SetMaxDynamicTableSize(0)
	for id := uint32(1); ; id += 2 {
		w.headers(id, true, ":method", "GET")
		ev, err := s.Receive(w.buf.Bytes())
		w.buf.Reset()
		if err != nil {
			if s.err.Code != http2.ErrCodeEnhanceYourCalm || len(s.Control()) > maxControl+1000 {
				t.Fatalf("%v with %d bytes queued", err, len(s.Control()))
			}
			break
		}
		st := ev[0].Stream
		if ev[0].Kind != EventHeaders {
			st = ev[1].Stream // behind EventSettings
		}
		if err := s.Respond(st, []hpack.HeaderField{{Name: ":status", Value: "400"}}, true); err != nil {
			t.Fatal(err)
		}
		if len(s.Control()) > 2*maxControl {
			t.Fatal("no bound")
		}
	}
	var broken *ConnError
	if _, err := s.Receive([]byte("x")); !errors.As(err, &broken) {
		t.Fatal(err)
	}
}

// A header that is repeated through the dynamic table costs its full size each
// time, and is not unpacked beyond the bound. Where it is no mere excess, the
// session ends: it would go on costing time.
func TestHeaderBomb(t *testing.T) {
	for repeated, want := range map[int]string{
		bomb*DefaultMaxHeaderBytes/4033 - 1: "RST_STREAM 1 ENHANCE_YOUR_CALM",
		bomb * maxFields:                    "GOAWAY 0 ENHANCE_YOUR_CALM header list of more than 256 fields or 65536 bytes",
		10000:                               "GOAWAY 0 ENHANCE_YOUR_CALM header list of more than 256 fields or 65536 bytes",
	} {
		t.Run(fmt.Sprint(repeated), func(t *testing.T) { headerBomb(t, repeated, want) })
	}
}

func headerBomb(t *testing.T, repeated int, want string) {
	s := New(Config{})
	take(s)
	var hb bytes.Buffer
	enc := hpack.NewEncoder(&hb)
	f := hpack.HeaderField{Name: "x", Value: strings.Repeat("%", 4000)}
	must(enc.WriteField(f))
	for range repeated - 1 {
		must(enc.WriteField(f)) // one byte each
	}
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&b, nil)
	must(fr.WriteSettings())
	must(fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: hb.Bytes(), EndHeaders: true}))
	in := b.Bytes()
	allocated := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			s = New(Config{})
			if _, err := s.Receive(in); err != nil {
				b.Fatal(err)
			}
		}
	}).AllocedBytesPerOp()
	if allocated > 256<<10 {
		t.Fatalf("%d bytes allocated for a block of %d", allocated, hb.Len())
	}
	if got := frames(t, s); got[len(got)-1] != want {
		t.Fatal(got)
	}
}

// What a connection keeps at rest does not depend on what it once carried.
func TestRest(t *testing.T) {
	c, s := pair(t, Config{}, Config{})
	for i := range 3 * keepStreams {
		st, err := c.Open(connectFields(), nil)
		if err == ErrStreamLimit {
			t.Fatal(i)
		}
		_ = st
	}
	_, ev := pump(t, c, s)
	for _, e := range ev {
		s.Reset(e.Stream, http2.ErrCodeCancel)
	}
	if cap(s.ctl) < 4<<10 {
		for range 1000 {
			s.Ping([8]byte{})
		}
	}
	take(s)
	if s.ctl != nil || s.events != nil || cap(s.scratch.events) > keepEvents || s.gather != nil || s.block != nil || s.peak != 0 || len(s.streams) != 0 {
		t.Fatal(fmt.Sprint(cap(s.ctl), cap(s.scratch.events), cap(s.gather), cap(s.block), s.peak))
	}
}
