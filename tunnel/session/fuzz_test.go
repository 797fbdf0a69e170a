// SPDX-License-Identifier: Apache-2.0

package session_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/session"
)

// maxControl is above what a session may be made to queue, by the bounds of
// tunnel/h2: 64 KiB of replies, and answers up to 1 MiB.
const maxControl = 2 << 20 // bytes

// listener feeds a session, answers what comes and writes down what happened,
// whatever the pieces it came in.
type listener struct {
	t      *testing.T
	s      *session.Session
	client bool
	log    []string
	data   map[uint32][]byte
	err    error
}

func newListener(t *testing.T, client bool) *listener {
	c, s := layers(t)
	l := &listener{t: t, client: client, data: map[uint32][]byte{}}
	if !client {
		c = s
	}
	l.s = session.New(c, h2.New(h2.Config{Client: client, MaxConcurrentStreams: 5, MaxHeaderBytes: 1000}), nil)
	for range 3 {
		if client {
			if _, err := l.s.H2.Open([]hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "10.0.0.1:80"}}, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	return l
}

// feed is one read of the socket.
func (l *listener) feed(p []byte) {
	if l.err != nil {
		return
	}
	buf := make([]byte, l.s.Pending()+len(p))
	copy(buf[l.s.Restore(buf):], p)
	for {
		n, events, err := l.s.Next(buf)
		for i := range events {
			l.event(&events[i])
		}
		if err != nil {
			l.err = err
			if _, _, again := l.s.Next(bytes.Clone(p)); again == nil && l.s.H2.Err() == nil {
				l.t.Fatalf("a session goes on after: %v", err)
			}
			return
		}
		if n == 0 {
			break
		}
		clear(buf[:n])
		buf = buf[n:]
	}
	l.s.Keep(buf)
	if len(buf) >= record.SlotLen {
		l.t.Fatalf("%d bytes are not a whole record", len(buf))
	}
	if n := len(l.s.H2.Control()); n > maxControl {
		l.t.Fatalf("%d bytes queued", n)
	}
}

func (l *listener) event(e *h2.Event) {
	id := uint32(0)
	if e.Stream != nil {
		id = e.Stream.ID()
	}
	switch e.Kind {
	case h2.EventData:
		l.data[id] = append(l.data[id], e.Data...)
		e.Stream.Enqueue(e.Data)
		if id%4 == 1 { // the others' applications take nothing
			n := e.Stream.QueuedBytes()
			e.Stream.Dequeue(n)
			l.s.H2.Taken(e.Stream, n)
		}
	case h2.EventHeaders:
		l.log = append(l.log, fmt.Sprint("headers ", id, e.Headers))
		if !l.client {
			_ = l.s.H2.Respond(e.Stream, []hpack.HeaderField{{Name: ":status", Value: "200"}}, id%8 == 7)
		}
	case h2.EventWritable: // depends on when it was answered
	default:
		l.log = append(l.log, fmt.Sprint(e.Kind, " ", id, e.Local, e.Code, e.LastID, string(e.Data)))
	}
}

// freeze takes the session over, in the middle of whatever it is.
func (l *listener) freeze(asJSON bool) {
	if l.err != nil {
		return
	}
	s, _, err := session.Thaw(carry(l.s.Freeze([]byte("unsent")), asJSON))
	if err != nil {
		l.t.Fatalf("thaw: %v", err)
	}
	if string(s.Unsent()) != "unsent" {
		l.t.Fatal("what was unsent is gone")
	}
	l.s = s
}

func (l *listener) summary() string {
	var b bytes.Buffer
	fmt.Fprintln(&b, l.err)
	for _, line := range l.log {
		fmt.Fprintln(&b, line)
	}
	ids := make([]uint32, 0, len(l.data))
	for id := range l.data {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		fmt.Fprintf(&b, "data %d %x\n", id, l.data[id])
	}
	fmt.Fprintln(&b, l.s.H2.CountStreams(), l.s.H2.GoingAway(), l.s.Pending())
	return b.String()
}

// FuzzSession gives a session what a peer may send: plaintext of any kind under
// the right keys, in records of any size with KeyUpdates and empty ones between
// them, then ciphertext of any kind. It is read whole and in pieces, with
// take-overs between these: nothing may panic or pass a bound, and no outcome
// may depend on the pieces.
func FuzzSession(f *testing.F) {
	frames := func(client bool, write func(*http2.Framer, func(pairs ...string) []byte)) []byte {
		var b, hb bytes.Buffer
		enc := hpack.NewEncoder(&hb)
		enc.SetMaxDynamicTableSize(0)
		if !client {
			b.WriteString(http2.ClientPreface)
		}
		fr := http2.NewFramer(&b, nil)
		_ = fr.WriteSettings()
		_ = fr.WriteSettingsAck()
		write(fr, func(pairs ...string) []byte {
			hb.Reset()
			for i := 0; i < len(pairs); i += 2 {
				_ = enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
			}
			return bytes.Clone(hb.Bytes())
		})
		return b.Bytes()
	}
	request := frames(false, func(fr *http2.Framer, block func(...string) []byte) {
		hb := block(":method", "CONNECT", ":authority", "10.0.0.1:80", "baggage", "k8s.pod.name=a")
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: hb[:5]})
		_ = fr.WriteContinuation(1, true, hb[5:])
		_ = fr.WriteData(1, false, []byte("hello"))
		_ = fr.WritePing(false, [8]byte{})
		_ = fr.WriteDataPadded(1, true, []byte("bye"), []byte{0, 0})
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: block(":method", "CONNECT"), EndHeaders: true})
		_ = fr.WriteRSTStream(3, http2.ErrCodeCancel)
	})
	response := frames(true, func(fr *http2.Framer, block func(...string) []byte) {
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(":status", "200"), EndHeaders: true})
		_ = fr.WriteData(1, false, []byte("hello"))
		_ = fr.WriteWindowUpdate(1, 10)
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: block(":status", "503"), EndHeaders: true, EndStream: true})
		_ = fr.WriteRSTStream(3, http2.ErrCodeNo)
		_ = fr.WriteGoAway(3, http2.ErrCodeNo, nil)
		_ = fr.WriteData(1, true, nil)
	})
	f.Add(false, []byte{30, 7, 1, 200}, request, []byte{})
	f.Add(true, []byte{30, 7, 1, 200}, response, []byte{})
	f.Add(false, []byte{255}, request, []byte("\x17\x03\x03\x00\x13 but not of this key"))
	f.Add(true, []byte{0}, []byte{}, []byte("\x15\x03\x03\x00\x02\x02\x28"))
	f.Add(false, []byte{}, []byte{}, []byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, client bool, cuts, plain, cipher []byte) {
		if len(plain) > 4<<10 || len(cipher) > 4<<10 || len(cuts) > 100 {
			return
		}
		cut := func(i int) int {
			if len(cuts) == 0 {
				return 256
			}
			return int(cuts[i%len(cuts)])
		}
		peer, other := layers(t)
		if client {
			peer = other
		}
		var wire []byte
		for i := 0; len(plain) > 0; i++ {
			switch n := cut(i); {
			case n%16 == 3 && i < 50:
				wire = peer.UpdateKeys(wire, n%32 == 3)
			case n%16 == 5 && i < 50:
				wire = append(wire, seal(peer, nil)...)
			default:
				n = min(n+1, len(plain))
				wire = append(wire, seal(peer, plain[:n])...)
				plain = plain[n:]
			}
			if i == 50 {
				cuts = nil // some are no records of data
			}
		}
		wire = append(wire, cipher...)

		whole, split := newListener(t, client), newListener(t, client)
		whole.feed(wire)
		for i := 0; len(wire) > 0; i++ {
			n := min(cut(i+1)+1, len(wire))
			if cut(i)%3 == 0 && i < 40 {
				split.freeze(i%2 == 0)
			}
			split.feed(wire[:n])
			wire = wire[n:]
		}
		if d := cmp.Diff(whole.summary(), split.summary()); d != "" {
			t.Fatalf("whole against split, with take-overs:\n%s", d)
		}
		// What is to be said can be said, unless the record layer has ended.
		slot := make([]byte, record.SlotLen)
		for len(split.s.H2.Control()) > 0 {
			n := split.s.FillControl(slot, 0)
			if split.s.Records.Seal(slot, n) == 0 && split.err == nil {
				t.Fatal("nothing is sealed")
			}
		}
	})
}
