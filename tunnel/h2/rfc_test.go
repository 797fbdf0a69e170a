// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// script builds what a peer sends, legal or not.
type script struct {
	buf bytes.Buffer
	fr  *http2.Framer
	enc *hpack.Encoder
	hb  bytes.Buffer
}

// newScript begins as a peer of c does: its preface, SETTINGS, and an
// acknowledgement of ours.
func newScript(client bool) *script {
	w := &script{}
	w.fr = http2.NewFramer(&w.buf, nil)
	w.fr.AllowIllegalWrites = true
	w.enc = hpack.NewEncoder(&w.hb)
	if client {
		w.buf.WriteString(http2.ClientPreface)
	}
	must(w.fr.WriteSettings())
	must(w.fr.WriteSettingsAck())
	return w
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// block encodes name and value pairs.
func (w *script) block(pairs ...string) []byte {
	w.hb.Reset()
	for i := 0; i < len(pairs); i += 2 {
		must(w.enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]}))
	}
	return append([]byte(nil), w.hb.Bytes()...)
}

func (w *script) headers(id uint32, end bool, pairs ...string) {
	must(w.fr.WriteHeaders(http2.HeadersFrameParam{
		StreamID: id, BlockFragment: w.block(pairs...), EndStream: end, EndHeaders: true,
	}))
}

func (w *script) connect(id uint32) {
	w.headers(id, false, ":method", "CONNECT", ":authority", "10.0.0.1:80")
}

func (w *script) raw(length int, t http2.FrameType, f http2.Flags, id uint32, payload string) {
	w.buf.Write(appendFrameHeader(nil, length, t, f, id))
	w.buf.WriteString(payload)
}

// outcome is how a connection took a script: the error's code, or what it
// reset, or "ok".
func outcome(c *Conn, err error) string {
	var broken *ConnError
	if errors.As(err, &broken) {
		return broken.Code.String()
	}
	var out []string
	fr := http2.NewFramer(nil, bytes.NewReader(c.Control()))
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			break
		}
		if r, ok := f.(*http2.RSTStreamFrame); ok {
			out = append(out, fmt.Sprintf("stream %d %v", r.StreamID, r.ErrCode))
		}
	}
	if len(out) == 0 {
		return "ok"
	}
	return strings.Join(out, ", ")
}

const acked = http2.FlagSettingsAck // the same bit as END_STREAM

func TestRFC9113(t *testing.T) {
	const (
		server = false
		client = true
	)
	tests := []struct {
		name   string
		client bool // what we are
		opened int  // streams that we opened before
		do     func(w *script)
		want   string
	}{
		// 3.4: the preface.
		{"3.4 wrong preface", server, 0, func(w *script) { w.buf.Reset(); w.buf.WriteString("GET / HTTP/1.1\r\n\r\n") }, "PROTOCOL_ERROR"},
		{"3.4 no SETTINGS", server, 0, func(w *script) {
			w.buf.Reset()
			w.buf.WriteString(http2.ClientPreface)
			must(w.fr.WritePing(false, [8]byte{}))
		}, "PROTOCOL_ERROR"},
		{"3.4 acknowledgement first", client, 0, func(w *script) { w.buf.Reset(); must(w.fr.WriteSettingsAck()) }, "PROTOCOL_ERROR"},
		{"3.4 no SETTINGS from a server", client, 0, func(w *script) { w.buf.Reset(); must(w.fr.WriteWindowUpdate(0, 1)) }, "PROTOCOL_ERROR"},

		// 4.1, 4.2: frames.
		{"4.1 unknown type ignored", server, 0, func(w *script) { w.raw(3, 0xbe, 0xff, 77, "abc") }, "ok"},
		{"4.1 reserved bit ignored", server, 0, func(w *script) { w.connect(1); w.raw(1, 0, 0, 1<<31|1, "x") }, "ok"},
		{"4.2 frame above the size we advertise", server, 0, func(w *script) { w.connect(1); w.raw(MaxDataFrame+1, 0, 0, 1, "") }, "FRAME_SIZE_ERROR"},
		{"4.2 unknown frame above it", server, 0, func(w *script) { w.raw(MaxDataFrame+1, 0xbe, 0, 1, "") }, "FRAME_SIZE_ERROR"},
		{"4.2 gathered frame above its bound", server, 0, func(w *script) { w.raw(MaxOtherFrame+1, http2.FrameGoAway, 0, 0, "") }, "FRAME_SIZE_ERROR"},

		// 4.3: field blocks.
		{"4.3 cannot be decoded", server, 0, func(w *script) { w.raw(1, http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, "\xff") }, "COMPRESSION_ERROR"},
		{"4.3 index of nothing", server, 0, func(w *script) { w.raw(1, http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, "\xbe") }, "COMPRESSION_ERROR"},
		{"4.3 for a stream that is gone", server, 0, func(w *script) {
			w.connect(1)
			must(w.fr.WriteRSTStream(1, http2.ErrCodeCancel))
			w.raw(1, http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, "\xbe")
		}, "COMPRESSION_ERROR"},
		{"4.3 interrupted", server, 0, func(w *script) {
			must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: w.block(":method", "CONNECT")}))
			must(w.fr.WritePing(false, [8]byte{}))
		}, "PROTOCOL_ERROR"},
		{"4.3 interrupted by an unknown frame", server, 0, func(w *script) {
			must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: w.block(":method", "CONNECT")}))
			w.raw(0, 0xbe, 0, 0, "")
		}, "PROTOCOL_ERROR"},
		{"4.3.1 no table size update", server, 0, func(w *script) { w.enc = hpack.NewEncoder(&w.hb); w.connect(1) }, "COMPRESSION_ERROR"},
		{"4.3.1 table size above what was acknowledged", server, 0, func(w *script) {
			w.raw(3, http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, "\x20\x21\x82")
		}, "COMPRESSION_ERROR"},

		// 5.1: stream states.
		{"5.1 idle: DATA", server, 0, func(w *script) { must(w.fr.WriteData(1, false, []byte("x"))) }, "PROTOCOL_ERROR"},
		{"5.1 idle: RST_STREAM", server, 0, func(w *script) { must(w.fr.WriteRSTStream(1, 0)) }, "PROTOCOL_ERROR"},
		{"5.1 idle: WINDOW_UPDATE", server, 0, func(w *script) { must(w.fr.WriteWindowUpdate(1, 1)) }, "PROTOCOL_ERROR"},
		{"5.1 idle: CONTINUATION", server, 0, func(w *script) { must(w.fr.WriteContinuation(1, true, nil)) }, "PROTOCOL_ERROR"},
		{"5.1 idle: PRIORITY", server, 0, func(w *script) { must(w.fr.WritePriority(1, http2.PriorityParam{})) }, "ok"},
		{"5.1 half-closed: DATA", server, 0, func(w *script) {
			w.headers(1, true, ":method", "CONNECT", ":authority", "10.0.0.1:80")
			must(w.fr.WriteData(1, false, []byte("x")))
		}, "stream 1 STREAM_CLOSED"},
		{"5.1 half-closed: HEADERS", server, 0, func(w *script) {
			w.headers(1, true, ":method", "CONNECT", ":authority", "10.0.0.1:80")
			w.headers(1, true, "a", "b")
		}, "stream 1 STREAM_CLOSED"},
		{"5.1 half-closed: WINDOW_UPDATE", server, 0, func(w *script) {
			w.headers(1, true, ":method", "CONNECT", ":authority", "10.0.0.1:80")
			must(w.fr.WriteWindowUpdate(1, 1))
		}, "ok"},
		{"5.1 closed: late frames", server, 0, func(w *script) {
			w.connect(1)
			must(w.fr.WriteRSTStream(1, 0))
			must(w.fr.WriteData(1, false, []byte("x")))
			must(w.fr.WriteWindowUpdate(1, 1))
			must(w.fr.WriteRSTStream(1, 0))
			must(w.fr.WriteData(1, true, nil))
		}, "ok"},
		{"5.1.1 even from a client", server, 0, func(w *script) { w.connect(2) }, "PROTOCOL_ERROR"},
		{"5.1.1 any from a server", client, 0, func(w *script) { w.headers(2, false, ":status", "200") }, "PROTOCOL_ERROR"},
		{"5.1.1 ours, not opened", client, 1, func(w *script) { w.headers(3, false, ":status", "200") }, "PROTOCOL_ERROR"},
		{"5.1.1 skipped ones are closed", server, 0, func(w *script) { w.connect(5); must(w.fr.WriteRSTStream(3, 0)) }, "ok"},

		// 6.1: DATA.
		{"6.1 stream 0", server, 0, func(w *script) { must(w.fr.WriteData(0, false, []byte("x"))) }, "PROTOCOL_ERROR"},
		{"6.1 padding as long as the payload", server, 0, func(w *script) { w.connect(1); w.raw(2, 0, http2.FlagDataPadded, 1, "\x02x") }, "PROTOCOL_ERROR"},
		{"6.1 nothing but padding", server, 0, func(w *script) { w.connect(1); w.raw(2, 0, http2.FlagDataPadded, 1, "\x01\x00") }, "ok"},
		{"6.1 no pad length", server, 0, func(w *script) { w.connect(1); w.raw(0, 0, http2.FlagDataPadded, 1, "") }, "FRAME_SIZE_ERROR"},
		{"6.1 before the answer", client, 1, func(w *script) { must(w.fr.WriteData(1, false, []byte("x"))) }, "stream 1 PROTOCOL_ERROR"},

		// 6.2: HEADERS.
		{"6.2 stream 0", server, 0, func(w *script) { w.connect(0) }, "PROTOCOL_ERROR"},
		{"6.2 padding longer than the payload", server, 0, func(w *script) {
			w.raw(2, http2.FrameHeaders, http2.FlagHeadersPadded|http2.FlagHeadersEndHeaders, 1, "\x02x")
		}, "PROTOCOL_ERROR"},
		{"6.2 no pad length", server, 0, func(w *script) { w.raw(0, http2.FrameHeaders, http2.FlagHeadersPadded, 1, "") }, "FRAME_SIZE_ERROR"},
		{"6.2 cut priority", server, 0, func(w *script) { w.raw(4, http2.FrameHeaders, http2.FlagHeadersPriority, 1, "\x00\x00\x00\x00") }, "FRAME_SIZE_ERROR"},
		{"6.2 padded, with priority", server, 0, func(w *script) {
			must(w.fr.WriteHeaders(http2.HeadersFrameParam{
				StreamID: 1, BlockFragment: w.block(":method", "CONNECT"), EndHeaders: true, PadLength: 9,
				Priority: http2.PriorityParam{StreamDep: 3, Weight: 7},
			}))
		}, "ok"},

		// 6.3: PRIORITY.
		{"6.3 stream 0", server, 0, func(w *script) { must(w.fr.WritePriority(0, http2.PriorityParam{})) }, "PROTOCOL_ERROR"},
		{"6.3 length", server, 0, func(w *script) { w.connect(1); w.raw(4, http2.FramePriority, 0, 1, "1234") }, "stream 1 FRAME_SIZE_ERROR"},

		// 6.4: RST_STREAM.
		{"6.4 stream 0", server, 0, func(w *script) { must(w.fr.WriteRSTStream(0, 0)) }, "PROTOCOL_ERROR"},
		{"6.4 length", server, 0, func(w *script) { w.connect(1); w.raw(5, http2.FrameRSTStream, 0, 1, "12345") }, "FRAME_SIZE_ERROR"},
		{"6.4 unknown code", server, 0, func(w *script) { w.connect(1); must(w.fr.WriteRSTStream(1, 0xffffffff)) }, "ok"},

		// 6.5: SETTINGS.
		{"6.5 on a stream", server, 0, func(w *script) { w.raw(0, http2.FrameSettings, 0, 1, "") }, "PROTOCOL_ERROR"},
		{"6.5 length", server, 0, func(w *script) { w.raw(5, http2.FrameSettings, 0, 0, "12345") }, "FRAME_SIZE_ERROR"},
		{"6.5 acknowledgement with a payload", server, 0, func(w *script) { w.raw(6, http2.FrameSettings, acked, 0, "123456") }, "FRAME_SIZE_ERROR"},
		{"6.5 unknown setting", server, 0, func(w *script) { must(w.fr.WriteSettings(http2.Setting{ID: 0xff, Val: 1})) }, "ok"},
		{"6.5.2 ENABLE_PUSH 2", server, 0, func(w *script) { must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 2})) }, "PROTOCOL_ERROR"},
		{"6.5.2 ENABLE_PUSH 1 from a client", server, 0, func(w *script) { must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 1})) }, "ok"},
		{"6.5.2 ENABLE_PUSH 1 from a server", client, 0, func(w *script) { must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 1})) }, "PROTOCOL_ERROR"},
		{"6.5.2 INITIAL_WINDOW_SIZE at its limit", server, 0, func(w *script) {
			must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: maxWindow}))
		}, "ok"},
		{"6.5.2 INITIAL_WINDOW_SIZE above it", server, 0, func(w *script) {
			must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: maxWindow + 1}))
		}, "FLOW_CONTROL_ERROR"},
		{"6.5.2 MAX_FRAME_SIZE below its limit", server, 0, func(w *script) {
			must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 16383}))
		}, "PROTOCOL_ERROR"},
		{"6.5.2 MAX_FRAME_SIZE at its limits", server, 0, func(w *script) {
			must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 16384}, http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1<<24 - 1}))
		}, "ok"},
		{"6.5.2 MAX_FRAME_SIZE above its limit", server, 0, func(w *script) {
			must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 24}))
		}, "PROTOCOL_ERROR"},

		// 6.6: PUSH_PROMISE.
		{"6.6 from a server", client, 1, func(w *script) {
			must(w.fr.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true}))
		}, "PROTOCOL_ERROR"},
		{"6.6 from a client", server, 0, func(w *script) {
			w.connect(1)
			must(w.fr.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true}))
		}, "PROTOCOL_ERROR"},

		// 6.7: PING.
		{"6.7 on a stream", server, 0, func(w *script) { w.raw(8, http2.FramePing, 0, 1, "12345678") }, "PROTOCOL_ERROR"},
		{"6.7 length", server, 0, func(w *script) { w.raw(7, http2.FramePing, 0, 0, "1234567") }, "FRAME_SIZE_ERROR"},
		{"6.7 answer without a question", server, 0, func(w *script) { must(w.fr.WritePing(true, [8]byte{})) }, "ok"},

		// 6.8: GOAWAY.
		{"6.8 on a stream", server, 0, func(w *script) { w.raw(8, http2.FrameGoAway, 0, 1, "12345678") }, "PROTOCOL_ERROR"},
		{"6.8 length", server, 0, func(w *script) { w.raw(7, http2.FrameGoAway, 0, 0, "1234567") }, "FRAME_SIZE_ERROR"},
		{"6.8 lowered", client, 0, func(w *script) { must(w.fr.WriteGoAway(maxStreamID, 0, nil)); must(w.fr.WriteGoAway(1, 0, nil)) }, "ok"},
		{"6.8 raised", client, 0, func(w *script) { must(w.fr.WriteGoAway(1, 0, nil)); must(w.fr.WriteGoAway(3, 0, nil)) }, "PROTOCOL_ERROR"},

		// 6.9: WINDOW_UPDATE.
		{"6.9 length", server, 0, func(w *script) { w.raw(3, http2.FrameWindowUpdate, 0, 0, "123") }, "FRAME_SIZE_ERROR"},
		{"6.9 of 0 on the connection", server, 0, func(w *script) { must(w.fr.WriteWindowUpdate(0, 0)) }, "PROTOCOL_ERROR"},
		{"6.9 of 0 on a stream", server, 0, func(w *script) { w.connect(1); must(w.fr.WriteWindowUpdate(1, 0)) }, "stream 1 PROTOCOL_ERROR"},
		{"6.9.1 connection at its limit", server, 0, func(w *script) { must(w.fr.WriteWindowUpdate(0, maxWindow-65535)) }, "ok"},
		{"6.9.1 connection above its limit", server, 0, func(w *script) { must(w.fr.WriteWindowUpdate(0, maxWindow-65534)) }, "FLOW_CONTROL_ERROR"},
		{"6.9.1 stream at its limit", server, 0, func(w *script) { w.connect(1); must(w.fr.WriteWindowUpdate(1, maxWindow-65535)) }, "ok"},
		{"6.9.1 stream above its limit", server, 0, func(w *script) { w.connect(1); must(w.fr.WriteWindowUpdate(1, maxWindow-65534)) }, "stream 1 FLOW_CONTROL_ERROR"},
		{"6.9.2 settings push a stream above it", server, 0, func(w *script) {
			w.connect(1)
			must(w.fr.WriteWindowUpdate(1, maxWindow-65535))
			must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 65536}))
		}, "FLOW_CONTROL_ERROR"},

		// 6.10: CONTINUATION.
		{"6.10 after a whole block", server, 0, func(w *script) { w.connect(1); must(w.fr.WriteContinuation(1, true, nil)) }, "PROTOCOL_ERROR"},
		{"6.10 of another stream", server, 0, func(w *script) {
			must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: w.block(":method", "CONNECT")}))
			must(w.fr.WriteContinuation(3, true, nil))
		}, "PROTOCOL_ERROR"},
		{"6.10 in pieces", server, 0, func(w *script) {
			b := w.block(":method", "CONNECT")
			must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:2]}))
			must(w.fr.WriteContinuation(1, false, nil))
			must(w.fr.WriteContinuation(1, true, b[2:]))
		}, "ok"},

		// 8.1 to 8.3: malformed messages.
		{"8.1 trailers without END_STREAM", client, 1, func(w *script) {
			w.headers(1, false, ":status", "404")
			w.headers(1, false, "a", "b")
		}, "stream 1 PROTOCOL_ERROR"},
		{"8.1 trailers behind a refusal", client, 1, func(w *script) {
			w.headers(1, false, ":status", "404")
			must(w.fr.WriteData(1, false, []byte("no")))
			w.headers(1, true, "a", "b")
		}, "ok"},
		{"8.2 upper case", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", "Foo", "x") }, "stream 1 PROTOCOL_ERROR"},
		{"8.2 no name", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", "", "x") }, "stream 1 PROTOCOL_ERROR"},
		{"8.2 space in a name", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", "a b", "x") }, "stream 1 PROTOCOL_ERROR"},
		{"8.2 line feed in a value", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", "a", "x\ny") }, "stream 1 PROTOCOL_ERROR"},
		{"8.2.2 connection", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", "connection", "close") }, "stream 1 PROTOCOL_ERROR"},
		{"8.2.2 te", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", "te", "gzip") }, "stream 1 PROTOCOL_ERROR"},
		{"8.2.2 te: trailers", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", "te", "trailers") }, "ok"},
		{"8.3 unknown pseudo-header", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", ":protocol", "websocket") }, "stream 1 PROTOCOL_ERROR"},
		{"8.3 behind a regular field", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", "a", "b", ":authority", "c") }, "stream 1 PROTOCOL_ERROR"},
		{"8.3 twice", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", ":method", "CONNECT") }, "stream 1 PROTOCOL_ERROR"},
		{"8.3.1 no method", server, 0, func(w *script) { w.headers(1, false, ":authority", "c") }, "stream 1 PROTOCOL_ERROR"},
		{"8.3.1 status in a request", server, 0, func(w *script) { w.headers(1, false, ":method", "CONNECT", ":status", "200") }, "stream 1 PROTOCOL_ERROR"},
		{"8.3.1 another method is the application's to refuse", server, 0, func(w *script) {
			w.headers(1, true, ":method", "GET", ":scheme", "http", ":path", "/", ":authority", "c")
		}, "ok"},
		{"8.3.2 no status", client, 1, func(w *script) { w.headers(1, false, "a", "b") }, "stream 1 PROTOCOL_ERROR"},
		{"8.3.2 method in an answer", client, 1, func(w *script) { w.headers(1, false, ":status", "200", ":method", "GET") }, "stream 1 PROTOCOL_ERROR"},
		{"8.3.2 status of two digits", client, 1, func(w *script) { w.headers(1, false, ":status", "20") }, "stream 1 PROTOCOL_ERROR"},
		{"8.3.2 informational first", client, 1, func(w *script) { w.headers(1, false, ":status", "103"); w.headers(1, false, ":status", "200") }, "ok"},
		{"8.3.2 informational ends the stream", client, 1, func(w *script) { w.headers(1, true, ":status", "103") }, "stream 1 PROTOCOL_ERROR"},
		{"8.6 101", client, 1, func(w *script) { w.headers(1, false, ":status", "101") }, "stream 1 PROTOCOL_ERROR"},

		// 8.5: CONNECT.
		{"8.5 HEADERS on a connected stream, from a client", server, 0, func(w *script) { w.connect(1); w.headers(1, true, "a", "b") }, "stream 1 PROTOCOL_ERROR"},
		{"8.5 HEADERS on a connected stream, from a server", client, 1, func(w *script) {
			w.headers(1, false, ":status", "200")
			w.headers(1, true, "a", "b")
		}, "stream 1 PROTOCOL_ERROR"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newScript(!tt.client)
			w.enc.SetMaxDynamicTableSize(0) // the acknowledgement promised it
			tt.do(w)
			for _, size := range []int{1 << 20, 1, 7} {
				c := New(Config{Client: tt.client})
				for range tt.opened {
					if _, err := c.Open(connectFields(), nil); err != nil {
						t.Fatal(err)
					}
				}
				take(c)
				var err error
				for b := w.buf.Bytes(); len(b) > 0 && err == nil; b = b[min(size, len(b)):] {
					_, err = c.Receive(b[:min(size, len(b))])
				}
				if got := outcome(c, err); got != tt.want {
					t.Errorf("in pieces of %d bytes: %s, want %s", size, got, tt.want)
				}
				if err != nil {
					checkGoAway(t, c, err)
				}
			}
		})
	}
}

// checkGoAway checks that an error told the peer, and that nothing is accepted
// afterwards.
func checkGoAway(t *testing.T, c *Conn, err error) {
	t.Helper()
	var last http2.Frame
	fr := http2.NewFramer(nil, bytes.NewReader(c.Control()))
	for {
		f, err := fr.ReadFrame()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		last = f
	}
	g, ok := last.(*http2.GoAwayFrame)
	var broken *ConnError
	if !errors.As(err, &broken) || !ok || g.ErrCode != broken.Code {
		t.Errorf("last frame after %v is %v", err, last)
	}
	if _, again := c.Receive([]byte("x")); again != err {
		t.Errorf("second error %v, first %v", again, err)
	}
	if _, err := c.Open(connectFields(), nil); err == nil {
		t.Error("stream opened on a broken connection")
	}
}
