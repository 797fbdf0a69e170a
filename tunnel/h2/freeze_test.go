// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// replay feeds a connection, answers and drains what comes, and writes down
// what happened in a form that does not depend on how the bytes were split.
type replay struct {
	t        testing.TB
	c        *Conn
	log      []string
	writable []uint32
	passive  bool // the application does nothing
	control  []byte
	err      error
	got      map[uint32][]byte // DATA of each stream
}

func newReplay(t testing.TB, cfg Config) *replay {
	r := &replay{t: t, c: New(cfg), got: map[uint32][]byte{}}
	if cfg.Client {
		for range 6 {
			if _, err := r.c.Open(connectFields(), nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	r.take()
	return r
}

func (r *replay) take() {
	b := r.c.Control()
	r.control = append(r.control, b...)
	r.c.ConsumeControl(len(b))
}

func (r *replay) feed(p []byte) {
	p = append([]byte(nil), p...) // events alias it: nothing may look at it later
	defer clear(p)
	events, err := r.c.Receive(p)
	if r.err == nil {
		r.err = err
	}
	for _, e := range events {
		id := uint32(0)
		if e.Stream != nil {
			id = e.Stream.ID()
		}
		switch e.Kind {
		case EventData:
			r.got[id] = append(r.got[id], e.Data...)
			if r.passive {
				break
			}
			e.Stream.Enqueue(e.Data)
			if id%4 == 1 { // the others' applications take nothing
				n := e.Stream.QueuedBytes()
				e.Stream.Dequeue(n)
				r.c.Taken(e.Stream, n)
			}
		case EventHeaders:
			r.log = append(r.log, fmt.Sprint("headers ", id, e.Headers))
			if r.c.cfg.Client || r.passive {
				break
			}
			if r.c.Respond(e.Stream, okFields(), id%8 == 7) != nil { // after a reset
				break
			}
			r.take()
			r.c.Ping([8]byte{byte(id)})
			if n := e.Stream.Sendable(); n > 0 { // until it starves
				r.control = append(r.control, frameData(r.c, e.Stream, make([]byte, n), false)...)
			}
		case EventWritable: // depends on when it was answered
			r.writable = append(r.writable, id)
		default:
			r.log = append(r.log, fmt.Sprint(e.Kind, " ", id, e.Local, e.Code, e.LastID, string(e.Data)))
		}
	}
	r.take()
	r.c.check(r.t)
}

// freeze carries the connection over through an encoding.
func (r *replay) freeze(asJSON bool) {
	user := map[uint32]any{}
	for id, s := range r.c.streams {
		user[id] = s.User
	}
	before := state(r.c)
	st := r.c.Freeze()
	if _, err := r.c.Receive(nil); err == nil {
		r.t.Error("a frozen connection is still in use")
	}
	var b bytes.Buffer
	var out State
	if asJSON {
		must(json.NewEncoder(&b).Encode(st))
		must(json.NewDecoder(&b).Decode(&out))
	} else {
		must(gob.NewEncoder(&b).Encode(st))
		must(gob.NewDecoder(&b).Decode(&out))
	}
	c, streams := Thaw(out)
	for _, s := range streams {
		s.User = user[s.ID()]
	}
	if after := state(c); after != before {
		r.t.Fatalf("thawed (-before +after):\n%s", cmp.Diff(before, after))
	}
	r.c = c
}

// summary is everything that a replay showed and left.
func (r *replay) summary() string {
	var b strings.Builder
	slices.Sort(r.writable)
	fmt.Fprintln(&b, r.err, r.writable)
	for _, l := range r.log {
		fmt.Fprintln(&b, l)
	}
	// The encoder repeats its table size update after a thaw, so header
	// blocks are compared decoded.
	fr := http2.NewFramer(nil, bytes.NewReader(bytes.TrimPrefix(r.control, []byte(http2.ClientPreface))))
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for {
		f, err := fr.ReadFrame()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			r.t.Fatalf("our frames: %v", err)
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			fmt.Fprintln(&b, "sent", f.StreamID, f.Fields, f.StreamEnded())
		case *http2.SettingsFrame:
			fmt.Fprintln(&b, "sent", f.String())
		case *http2.WindowUpdateFrame:
			fmt.Fprintln(&b, "sent", f.StreamID, f.Increment)
		case *http2.RSTStreamFrame:
			fmt.Fprintln(&b, "sent", f.StreamID, f.ErrCode)
		case *http2.GoAwayFrame:
			fmt.Fprintln(&b, "sent", f.LastStreamID, f.ErrCode, string(f.DebugData()))
		case *http2.PingFrame:
			fmt.Fprintln(&b, "sent ping", f.Data, f.IsAck())
		default:
			fmt.Fprintln(&b, "sent", f.Header())
		}
	}
	return b.String() + state(r.c)
}

// state is what a connection remembers, but for its HPACK tables.
func state(c *Conn) string {
	var b strings.Builder
	fmt.Fprintln(&b, c.cfg, c.err, c.mode, c.preface, c.partial[:c.have], c.frame, c.left, c.pad, c.cur != nil, c.gather,
		c.block, c.blockID, c.blockEnd, c.blockFrames, c.tableSize, c.wantUpdate, c.Control(), c.replies,
		c.nextID, c.peerID, c.opened, c.accepted, c.limited, c.sendWin, c.recvWin, c.recvDue, c.late,
		c.settled, c.peerStreams, c.peerWindow, c.peerHeaderList, c.peerTable, c.acked, c.pings, c.budget, c.earned,
		c.goneLast, c.goneSent, c.gonePeer, c.goneLimit)
	for _, s := range c.sorted() {
		fmt.Fprintln(&b, s.id, s.sendWin, s.recvWin, s.target, s.buffered, s.localClosed, s.remoteClosed, s.closed, s.reset,
			s.gotHeaders, s.sentHeaders, s.connected, s.starved, bytes.Join(s.queue.chunks, nil))
	}
	return b.String()
}

// clientConversation is what a client of another make sends: it uses a dynamic
// table until it has seen our SETTINGS, pads, splits header blocks, and stops
// in the middle.
func clientConversation() []byte {
	w := &script{}
	w.fr = http2.NewFramer(&w.buf, nil)
	w.enc = hpack.NewEncoder(&w.hb)
	w.buf.WriteString(http2.ClientPreface)
	must(w.fr.WriteSettings(
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100},
		http2.Setting{ID: http2.SettingHeaderTableSize, Val: 100},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: 5000},
	))
	must(w.fr.WriteWindowUpdate(0, 1000))
	baggage := "k8s.namespace.name=demo,k8s.pod.name=a-1"
	w.headers(1, false, ":method", "CONNECT", ":authority", "10.0.0.1:80", "baggage", baggage)
	// The same fields again: from the dynamic table, padded, in pieces.
	b := w.block(":method", "CONNECT", ":authority", "10.0.0.1:80", "baggage", baggage, "x-new", strings.Repeat("n", 40))
	must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: b[:3], PadLength: 3, Priority: http2.PriorityParam{Weight: 3}}))
	must(w.fr.WriteContinuation(3, false, b[3:4]))
	must(w.fr.WriteContinuation(3, false, nil))
	must(w.fr.WriteContinuation(3, true, b[4:]))
	must(w.fr.WriteData(1, false, []byte("hello")))
	must(w.fr.WriteDataPadded(3, false, []byte("padded"), make([]byte, 5)))
	must(w.fr.WriteDataPadded(3, false, nil, make([]byte, 5)))
	w.enc.SetMaxDynamicTableSize(200)
	w.headers(5, true, ":method", "CONNECT", ":authority", "10.0.0.1:80", "x-new", strings.Repeat("n", 40))
	w.headers(7, false, ":method", "CONNECT", ":authority", "[fd00::1]:80", "x-new", strings.Repeat("n", 40))
	must(w.fr.WriteData(7, false, []byte("queued, never taken")))
	must(w.fr.WriteData(7, true, nil)) // answered with an end: closed, with bytes left
	must(w.fr.WritePing(false, [8]byte{1, 2, 3}))
	must(w.fr.WriteSettingsAck())
	w.enc.SetMaxDynamicTableSize(0)
	w.headers(9, false, ":method", "CONNECT", ":authority", "10.0.0.1:80", "x-new", strings.Repeat("n", 40))
	must(w.fr.WriteRSTStream(9, http2.ErrCodeCancel))
	must(w.fr.WriteData(9, false, []byte("late")))
	must(w.fr.WritePriority(11, http2.PriorityParam{Weight: 1}))
	must(w.fr.WriteRawFrame(0xbe, 0xff, 3, []byte("unknown")))
	must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 200}))
	must(w.fr.WriteWindowUpdate(1, 50))
	must(w.fr.WriteData(1, false, nil))
	for range 5 {
		must(w.fr.WriteData(1, false, bytes.Repeat([]byte("bulk"), 1000)))
	}
	must(w.fr.WriteData(3, true, []byte("end")))
	must(w.fr.WriteData(3, false, []byte("beyond it"))) // STREAM_CLOSED
	w.headers(13, false, ":method", "CONNECT", "Bad Name", "x")
	must(w.fr.WriteGoAway(0, http2.ErrCodeNo, []byte("debug")))
	w.raw(20, http2.FrameData, 0, 1, "in the middle of")
	return w.buf.Bytes()
}

// serverConversation answers the six streams of a replay in different ways.
func serverConversation() []byte {
	w := &script{}
	w.fr = http2.NewFramer(&w.buf, nil)
	w.enc = hpack.NewEncoder(&w.hb)
	must(w.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 6}))
	w.headers(1, false, ":status", "200", "server", "istio-envoy", "baggage", "x=y")
	w.headers(3, false, ":status", "103", "server", "istio-envoy", "baggage", "x=y")
	w.headers(3, false, ":status", "200", "server", "istio-envoy", "baggage", "x=y")
	must(w.fr.WriteData(1, false, []byte("hello")))
	must(w.fr.WriteSettingsAck())
	w.enc.SetMaxDynamicTableSize(0)
	b := w.block(":status", "503", "culvert-reason", "refused")
	must(w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 5, BlockFragment: b[:2], EndStream: true}))
	must(w.fr.WriteContinuation(5, true, b[2:]))
	w.headers(7, false, ":status", "404")
	must(w.fr.WriteData(7, false, []byte("not found")))
	w.headers(7, true, "trailer", "x")
	must(w.fr.WriteDataPadded(3, true, []byte("padded"), make([]byte, 200)))
	must(w.fr.WriteRSTStream(9, http2.ErrCodeRefusedStream))
	must(w.fr.WriteGoAway(9, http2.ErrCodeNo, []byte("drain")))
	must(w.fr.WriteWindowUpdate(1, 77))
	must(w.fr.WriteData(1, true, []byte("bye")))
	w.raw(5, http2.FrameWindowUpdate, 0, 0, "12345") // a connection error
	return w.buf.Bytes()
}

// bulk reports whether byte i is one among many that are alike.
func bulk(in []byte, i int) bool {
	return bytes.Contains(in[max(0, i-8):min(i+8, len(in))], []byte("bulkbulkbulk"))
}

// A connection may be frozen between any two calls: in the middle of a frame's
// header, of its padding, of a header block.
func TestFreezeAtEveryByte(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  Config
		in   []byte
	}{
		{"server", Config{}, clientConversation()},
		{"client", Config{Client: true}, serverConversation()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			whole := newReplay(t, tt.cfg)
			whole.feed(tt.in)
			if len(whole.log) < 8 || len(whole.got) < 3 {
				t.Fatalf("the conversation did not get far:\n%s", whole.summary())
			}
			// Answers are given between two calls, so where the bytes are
			// split shows in the order of what is sent: compare with the
			// same split, not frozen.
			check := func(at string, plain, frozen *replay) {
				t.Helper()
				if a, b := plain.summary(), frozen.summary(); a != b {
					t.Fatalf("frozen at %s (-not +frozen):\n%s", at, cmp.Diff(a, b))
				}
				if !slices.Equal(whole.log, frozen.log) {
					t.Fatalf("events, split at %s (-whole +frozen):\n%s", at, cmp.Diff(whole.log, frozen.log))
				}
				if !maps.EqualFunc(whole.got, frozen.got, bytes.Equal) {
					t.Fatalf("data, split at %s (-whole +frozen):\n%s", at, cmp.Diff(whole.got, frozen.got))
				}
			}
			for i := range len(tt.in) + 1 {
				if bulk(tt.in, i) && i%997 != 0 {
					continue
				}
				plain, frozen := newReplay(t, tt.cfg), newReplay(t, tt.cfg)
				plain.feed(tt.in[:i])
				plain.feed(tt.in[i:])
				frozen.feed(tt.in[:i])
				frozen.freeze(i%2 == 0)
				frozen.feed(tt.in[i:])
				check(fmt.Sprintf("byte %d of %d", i, len(tt.in)), plain, frozen)
			}
			plain, frozen := newReplay(t, tt.cfg), newReplay(t, tt.cfg)
			for i := range tt.in {
				plain.feed(tt.in[i : i+1])
				if !bulk(tt.in, i) {
					frozen.freeze(i%2 == 0)
				}
				frozen.feed(tt.in[i : i+1])
			}
			check("every byte", plain, frozen)
		})
	}
}

// What is queued and not sent yet survives too, in its order.
func TestFreezeKeepsControl(t *testing.T) {
	c, s := pair(t, Config{}, Config{})
	for range 3 {
		if _, err := c.Open(connectFields(), nil); err != nil {
			t.Fatal(err)
		}
	}
	c.Ping([8]byte{})
	want := append([]byte(nil), c.Control()...)
	c.ConsumeControl(5) // half of a frame is on its way
	first := want[:5]
	c, streams := Thaw(c.Freeze())
	if len(streams) != 3 || streams[0].ID() != 1 || streams[2].ID() != 5 {
		t.Fatal(streams)
	}
	if got := append(first, c.Control()...); !bytes.Equal(got, want) {
		t.Fatal("control bytes differ")
	}
	if ev := receive(t, s, want); len(ev) != 3 {
		t.Fatal(ev)
	}
	// The thawed encoder goes on where the old one was.
	c.ConsumeControl(len(c.Control()))
	if _, err := c.Open(connectFields(), nil); err != nil {
		t.Fatal(err)
	}
	if ev := receive(t, s, take(c)); len(ev) != 1 || ev[0].Stream.ID() != 7 || len(ev[0].Headers) != 3 {
		t.Fatal(ev)
	}
}
