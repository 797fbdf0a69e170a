// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// opening is what a peer of a connection begins with.
func opening(client bool) []byte { return newScript(!client).buf.Bytes() }

// unbulked is a conversation without what repeats, nor its first frames, which
// are in every input.
func unbulked(in []byte) []byte {
	in = bytes.ReplaceAll(in, []byte("bulk"), nil)
	return in[len(http2.ClientPreface):]
}

// check checks what holds between any two calls.
func (c *Conn) check(t testing.TB) {
	t.Helper()
	opened, accepted := 0, 0
	for id, s := range c.streams {
		switch {
		case s.id != id || s.reset || s.closed && s.buffered == 0:
			t.Fatalf("stream %d is remembered: %+v", id, s)
		case s.buffered < 0 || s.recvWin < 0 && !s.closed:
			t.Fatalf("stream %d has wrong windows: %+v", id, s)
		case int(s.buffered)+int(s.recvWin) > maxWindow:
			t.Fatalf("stream %d may have more than its window: %+v", id, s)
		}
		switch {
		case !c.ours(id):
			accepted++
		case !s.closed:
			opened++
		}
	}
	switch {
	case opened != c.opened || accepted != c.accepted || accepted > int(c.cfg.MaxConcurrentStreams):
		t.Fatalf("%d streams opened, %d accepted, counted %d and %d", opened, accepted, c.opened, c.accepted)
	case c.recvWin+c.recvDue != ConnWindow || c.recvDue >= ConnWindow/4 && c.err == nil:
		t.Fatalf("connection window %d, due %d", c.recvWin, c.recvDue)
	case len(c.gather) > MaxOtherFrame || len(c.block) > c.cfg.MaxHeaderBytes:
		t.Fatalf("%d bytes gathered, a block of %d", len(c.gather), len(c.block))
	case c.late < 0 || c.budget < 0 || c.budget > maxBudget || c.left < 0 || c.pad < 0:
		t.Fatalf("late %d, budget %d, left %d, pad %d", c.late, c.budget, c.left, c.pad)
	}
}

// FuzzReceive splits the same bytes in different ways, with a freeze at some of
// the splits: nothing but the pieces of DATA may differ. Then an application
// acts on them: nothing may panic or pass a bound.
func FuzzReceive(f *testing.F) {
	f.Add(false, []byte{3, 7, 200}, unbulked(clientConversation()))
	f.Add(true, []byte{1}, unbulked(serverConversation()))
	f.Add(false, []byte{1}, []byte{})
	for _, client := range []bool{true, false} {
		w := newScript(!client)
		n := w.buf.Len()
		w.enc.SetMaxDynamicTableSize(0)
		if client {
			w.headers(1, false, ":status", "200")
		} else {
			w.connect(1)
		}
		must(w.fr.WriteDataPadded(1, false, []byte("data"), []byte{0, 0}))
		must(w.fr.WriteWindowUpdate(1, 5))
		must(w.fr.WritePing(true, [8]byte{}))
		must(w.fr.WriteData(1, true, []byte("data")))
		f.Add(client, []byte{5, 1}, w.buf.Bytes()[n:])
	}
	f.Fuzz(func(t *testing.T, client bool, cuts, in []byte) {
		if len(in) > 4<<10 {
			return
		}
		in = append(opening(client), in...)
		cfg := Config{Client: client, MaxConcurrentStreams: 5, MaxHeaderBytes: 1000}
		whole, split := newReplay(t, cfg), newReplay(t, cfg)
		whole.passive, split.passive = true, true
		whole.feed(in)
		frozen := 0
		for rest, i := in, 0; len(rest) > 0; i++ {
			n := len(rest)
			if len(cuts) > 0 {
				cut := cuts[i%len(cuts)]
				n = min(int(cut)+1, n)
				if cut%5 == 0 && split.err == nil && frozen < 20 {
					frozen++
					split.freeze(false)
				}
			}
			split.feed(rest[:n])
			split.c.check(t)
			rest = rest[n:]
		}
		if a, b := whole.summary(), split.summary(); a != b {
			t.Fatalf("whole against split:\n%s", cmp.Diff(a, b))
		}
		for id := range whole.got {
			if !bytes.Equal(whole.got[id], split.got[id]) {
				t.Fatalf("data of stream %d differs", id)
			}
		}

		active := newReplay(t, cfg)
		for rest, i := in, 0; len(rest) > 0; i++ {
			n := len(rest)
			if len(cuts) > 0 {
				cut := cuts[i%len(cuts)]
				n = min(int(cut)+1, n)
				for _, s := range active.c.sorted() {
					switch (int(cut) + int(s.id)) % 11 {
					case 0:
						active.c.Reset(s, http2.ErrCodeCancel)
					case 1:
						active.c.End(s)
					case 2:
						active.c.Taken(s, s.Buffered())
					case 3:
						active.c.SetWindow(s, 1<<(cut%32))
					}
				}
				if cut == 77 {
					active.c.GoAway(http2.ErrCodeNo, "")
				}
			}
			active.feed(rest[:n])
			rest = rest[n:]
		}
	})
}

// FuzzFramer compares with x/net's Framer, frame by frame: what it finds
// malformed fails here too, and what both take means the same. Where it reads a
// frame and we do not, the reason is one that it cannot know, such as a
// stream's state.
func FuzzFramer(f *testing.F) {
	f.Add(unbulked(clientConversation()))
	f.Add([]byte{})
	w := newScript(true)
	n := w.buf.Len()
	w.connect(1)
	must(w.fr.WriteData(1, false, []byte("data")))
	must(w.fr.WriteDataPadded(1, true, []byte("data"), []byte{0, 0}))
	must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: w.block(":method", "CONNECT"), EndHeaders: true, PadLength: 4}))
	f.Add(w.buf.Bytes()[n:])
	f.Fuzz(func(t *testing.T, in []byte) {
		// No acknowledgement of ours: their decoder cannot know of it.
		w := newScript(true)
		w.buf.Truncate(w.buf.Len() - FrameHeaderLen)
		c := New(Config{})
		receive(t, c, w.buf.Bytes())
		take(c)

		var reader bytes.Reader
		theirs := http2.NewFramer(nil, &reader)
		theirs.SetMaxReadFrameSize(MaxDataFrame)
		decoder := hpack.NewDecoder(4096, nil)
		var block []byte
		for len(in) >= FrameHeaderLen {
			n := FrameHeaderLen + (int(in[0])<<16 | int(in[1])<<8 | int(in[2]))
			if n > len(in) {
				return
			}
			raw := in[:n]
			in = in[n:]
			reader.Reset(raw)
			frame, theirErr := theirs.ReadFrame()
			id := uint32(raw[5]&0x7f)<<24 | uint32(raw[6])<<16 | uint32(raw[7])<<8 | uint32(raw[8])
			known := c.Stream(id) != nil
			events, err := c.Receive(raw)
			c.check(t)

			var connErr http2.ConnectionError
			var streamErr http2.StreamError
			switch {
			case err != nil && theirErr == nil:
				return // they do not keep state
			case err == nil && errors.As(theirErr, &connErr), err == nil && errors.Is(theirErr, io.ErrUnexpectedEOF):
				switch kind := http2.FrameType(raw[3]); {
				case kind > http2.FrameContinuation: // an extension of theirs, such as PRIORITY_UPDATE
					return
				case kind == http2.FrameData && !known: // not looked at
					return
				case kind == http2.FrameData && slices.Contains(frames(t, c), fmt.Sprintf("RST_STREAM %d STREAM_CLOSED", id)):
					return // nor is the padding of what comes after the end
				case kind == http2.FramePriority && id != 0: // an error of the stream: RFC 9113, section 6.3
					if got := frames(t, c); !slices.Contains(got, fmt.Sprintf("RST_STREAM %d FRAME_SIZE_ERROR", id)) {
						t.Fatalf("%x: %v", raw, got)
					}
					return
				}
				t.Fatalf("%x: they say %v, we nothing", raw[:FrameHeaderLen], theirErr)
			case err == nil && errors.As(theirErr, &streamErr):
				if known && !resets(events, id) {
					t.Fatalf("%x: they say %v, our events are %+v", raw, theirErr, events)
				}
			case err != nil && theirErr != nil:
				var broken *ConnError
				if errors.As(err, &broken) && errors.As(theirErr, &connErr) && broken.Code != http2.ErrCode(connErr) && broken.Code != http2.ErrCodeEnhanceYourCalm {
					// They find fault with another thing first.
					ok := []http2.ErrCode{http2.ErrCodeProtocol, http2.ErrCodeFrameSize, http2.ErrCodeFlowControl}
					if !slices.Contains(ok, broken.Code) {
						t.Fatalf("%x: they say %v, we %v", raw, theirErr, err)
					}
				}
				return
			}
			if err != nil {
				return
			}
			switch frame := frame.(type) {
			case *http2.DataFrame:
				if known && !resets(events, id) {
					if got := joined(events); !bytes.Equal(got, frame.Data()) {
						t.Fatalf("data %q, theirs %q", got, frame.Data())
					}
					if ended := slices.ContainsFunc(events, func(e Event) bool { return e.Kind == EventEnd }); ended != frame.StreamEnded() {
						t.Fatalf("ended %v, theirs %v", ended, frame.StreamEnded())
					}
				}
			case *http2.HeadersFrame:
				block = append([]byte(nil), frame.HeaderBlockFragment()...)
				compareBlock(t, decoder, block, frame.HeadersEnded(), events)
			case *http2.ContinuationFrame:
				block = append(block, frame.HeaderBlockFragment()...)
				compareBlock(t, decoder, block, frame.HeadersEnded(), events)
			}
			c.ConsumeControl(len(c.Control()))
			c.Refill()
		}
	})
}

func compareBlock(t *testing.T, d *hpack.Decoder, block []byte, whole bool, events []Event) {
	if !whole {
		return
	}
	want, err := d.DecodeFull(block)
	if err != nil {
		t.Fatalf("we decode a block that they do not: %v", err)
	}
	for _, e := range events {
		if e.Kind != EventHeaders {
			continue
		}
		if !slices.Equal(e.Headers, want) {
			t.Fatalf("headers %v, theirs %v", e.Headers, want)
		}
		if err := theirJudgement(want); err != nil {
			t.Fatalf("we take %v, they say %v", want, err)
		}
	}
}

// theirJudgement is what x/net says of a header list.
func theirJudgement(fields []hpack.HeaderField) error {
	var hb, b bytes.Buffer
	enc := hpack.NewEncoder(&hb)
	for _, f := range fields {
		must(enc.WriteField(f))
	}
	fr := http2.NewFramer(&b, &b)
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	first := hb.Next(defaultMaxFrame)
	must(fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: first, EndHeaders: hb.Len() == 0}))
	for hb.Len() > 0 {
		next := hb.Next(defaultMaxFrame)
		must(fr.WriteContinuation(1, hb.Len() == 0, next))
	}
	_, err := fr.ReadFrame()
	if err != nil {
		return fmt.Errorf("%w (%w)", err, fr.ErrorDetail())
	}
	return nil
}

func resets(events []Event, id uint32) bool {
	return slices.ContainsFunc(events, func(e Event) bool { return e.Kind == EventReset && e.Stream.ID() == id })
}

func joined(events []Event) (data []byte) {
	for _, e := range events {
		if e.Kind == EventData {
			data = append(data, e.Data...)
		}
	}
	return data
}
