// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
)

// tunnelled is a pair with one stream that was answered with 200.
func tunnelled(t testing.TB, server Config) (c, s *Conn, cs, ss *Stream) {
	t.Helper()
	c, s = pair(t, Config{}, server)
	cs, ss = another(t, c, s)
	return c, s, cs, ss
}

func another(t testing.TB, c, s *Conn) (cs, ss *Stream) {
	t.Helper()
	cs, err := c.Open(connectFields(), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, ev := pump(t, c, s)
	ss = ev[0].Stream
	if err := s.Respond(ss, okFields(), false); err != nil {
		t.Fatal(err)
	}
	pump(t, c, s)
	return cs, ss
}

// frames says what a connection has queued, and takes it.
func frames(t testing.TB, c *Conn) []string {
	t.Helper()
	var out []string
	fr := http2.NewFramer(nil, bytes.NewReader(take(c)))
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return out
		}
		switch f := f.(type) {
		case *http2.WindowUpdateFrame:
			out = append(out, fmt.Sprintf("WINDOW_UPDATE %d +%d", f.StreamID, f.Increment))
		case *http2.RSTStreamFrame:
			out = append(out, fmt.Sprintf("RST_STREAM %d %v", f.StreamID, f.ErrCode))
		case *http2.GoAwayFrame:
			out = append(out, fmt.Sprintf("GOAWAY %d %v %s", f.LastStreamID, f.ErrCode, f.DebugData()))
		case *http2.PingFrame:
			out = append(out, fmt.Sprintf("PING %v %s", f.IsAck(), f.Data[:]))
		default:
			out = append(out, fmt.Sprintf("%v %d %v", f.Header().Type, f.Header().StreamID, f.Header().Flags))
		}
	}
}

func wantFrames(t testing.TB, c *Conn, want ...string) {
	t.Helper()
	if d := cmp.Diff(want, frames(t, c)); d != "" {
		t.Fatalf("frames (-want +got):\n%s", d)
	}
}

func TestFirstFlight(t *testing.T) {
	c := New(Config{Client: true})
	if !bytes.HasPrefix(c.Control(), []byte(http2.ClientPreface)) {
		t.Fatal("no preface")
	}
	c.ConsumeControl(len(http2.ClientPreface))
	fr := http2.NewFramer(nil, bytes.NewReader(take(c)))
	f, err := fr.ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	got := map[http2.SettingID]uint32{}
	if err := f.(*http2.SettingsFrame).ForeachSetting(func(s http2.Setting) error { got[s.ID] = s.Val; return nil }); err != nil {
		t.Fatal(err)
	}
	want := map[http2.SettingID]uint32{
		http2.SettingHeaderTableSize: 0, http2.SettingEnablePush: 0, http2.SettingMaxConcurrentStreams: 1000,
		http2.SettingInitialWindowSize: 65536, http2.SettingMaxFrameSize: 1 << 20, http2.SettingMaxHeaderListSize: 16384,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	f, err = fr.ReadFrame()
	if u, ok := f.(*http2.WindowUpdateFrame); err != nil || !ok || u.StreamID != 0 || u.Increment != ConnWindow-65535 {
		t.Fatalf("second frame %v %v", f, err)
	}
}

// A stream takes exactly its window, and not a byte more.
func TestStreamWindowIsABound(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	ev := receive(t, s, frameData(c, cs, make([]byte, DefaultWindow), false))
	if len(ev) != 1 || ss.Buffered() != DefaultWindow {
		t.Fatalf("%v, buffered %d", ev, ss.Buffered())
	}
	if cs.Sendable() != 0 {
		t.Fatalf("sendable %d", cs.Sendable())
	}
	ev = receive(t, s, frameData(c, cs, make([]byte, 1), false))
	if len(ev) != 1 || ev[0].Kind != EventReset || !ev[0].Local || ev[0].Code != http2.ErrCodeFlowControl || !ss.Closed() {
		t.Fatalf("%v", ev)
	}
	wantFrames(t, s, "RST_STREAM 1 FLOW_CONTROL_ERROR")
}

// A peer that has not seen our SETTINGS may send 65,535 bytes, whatever they
// say.
func TestInitialWindowIsNeverBelowTheProtocols(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{InitialWindow: 10})
	receive(t, s, frameData(c, cs, make([]byte, 65535), false))
	if ss.Closed() || cs.Sendable() != 0 {
		t.Fatal("reset")
	}
}

// The connection's window is given back on receipt, whether or not anybody
// takes the bytes, and is a bound too.
func TestConnWindow(t *testing.T) {
	c, s, cs, _ := tunnelled(t, Config{InitialWindow: maxWindow})
	piece := make([]byte, MaxDataFrame)
	for n := 0; n < ConnWindow/4; n += len(piece) {
		if len(s.Control()) > 0 {
			t.Fatalf("update after %d bytes", n)
		}
		receive(t, s, frameData(c, cs, piece, false))
	}
	wantFrames(t, s, fmt.Sprintf("WINDOW_UPDATE 0 +%d", ConnWindow/4))

	c, s, cs, _ = tunnelled(t, Config{InitialWindow: maxWindow})
	s.recvWin = 100
	receive(t, s, frameData(c, cs, piece[:100], false))
	if _, err := s.Receive(frameData(c, cs, piece[:1], false)); err == nil || s.err.Code != http2.ErrCodeFlowControl {
		t.Fatalf("error %v", err)
	}
}

// DATA of streams that we reset is credited to the connection's window, and
// free of charge up to what the peer was allowed to have in flight.
func TestLateData(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	receive(t, s, frameData(c, cs, make([]byte, 536), false))
	s.Reset(ss, http2.ErrCodeCancel)
	wantFrames(t, s, "RST_STREAM 1 CANCEL")
	left := s.budget
	due := s.recvDue
	for range 65 {
		if ev := receive(t, s, frameData(c, cs, make([]byte, 1000), false)); len(ev) > 0 {
			t.Fatalf("events %v", ev)
		}
	}
	if s.budget != left || s.recvDue != due+65000 || s.late != 0 {
		t.Fatalf("budget %d of %d, due %d, late %d", s.budget, left, s.recvDue-due, s.late)
	}
	receive(t, s, frameData(c, cs, make([]byte, 1), false)) // more than it may
	if s.budget != left-1 {
		t.Fatalf("budget %d of %d", s.budget, left)
	}
}

// A reset in the middle of a DATA frame drops the rest of it.
func TestResetInsideAFrame(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	b := frameData(c, cs, make([]byte, 100), true)
	if ev := receive(t, s, b[:50]); len(ev) != 1 {
		t.Fatal(ev)
	}
	s.Reset(ss, http2.ErrCodeCancel)
	if ev := receive(t, s, b[50:]); len(ev) != 0 {
		t.Fatalf("events of a stream that was reset: %v", ev)
	}
	ss.Enqueue([]byte("x"))
	if ss.QueuedBytes() != 0 {
		t.Fatal("queued on a stream that was reset")
	}
	if len(s.streams) != 0 {
		t.Fatal("not forgotten")
	}
}

// What the application took is given back once it is a quarter of the window.
func TestTaken(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	receive(t, s, frameData(c, cs, make([]byte, DefaultWindow), false))
	s.Taken(ss, DefaultWindow/4-1)
	wantFrames(t, s)
	s.Taken(ss, 1)
	wantFrames(t, s, fmt.Sprintf("WINDOW_UPDATE 1 +%d", DefaultWindow/4))
	s.Taken(ss, DefaultWindow) // more than there is
	wantFrames(t, s, fmt.Sprintf("WINDOW_UPDATE 1 +%d", 3*DefaultWindow/4))
	if ss.Buffered() != 0 || ss.recvWin != DefaultWindow {
		t.Fatalf("buffered %d, window %d", ss.Buffered(), ss.recvWin)
	}
	// Nothing is given back of a half that has ended.
	receive(t, c, appendWindowUpdate(nil, cs.id, DefaultWindow))
	receive(t, s, frameData(c, cs, make([]byte, DefaultWindow), true))
	s.Taken(ss, DefaultWindow)
	wantFrames(t, s)
}

func TestSetWindow(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	s.SetWindow(ss, 1<<20)
	wantFrames(t, s, fmt.Sprintf("WINDOW_UPDATE 1 +%d", 1<<20-DefaultWindow))
	receive(t, c, appendWindowUpdate(nil, 1, 1<<20-DefaultWindow))
	s.SetWindow(ss, DefaultWindow) // cannot be taken back
	receive(t, s, frameData(c, cs, make([]byte, 1<<20-DefaultWindow), false))
	s.Taken(ss, 1<<20-DefaultWindow)
	wantFrames(t, s)
	receive(t, s, frameData(c, cs, make([]byte, DefaultWindow/4), false))
	s.Taken(ss, DefaultWindow/4)
	wantFrames(t, s, fmt.Sprintf("WINDOW_UPDATE 1 +%d", DefaultWindow/4))
	s.SetWindow(ss, 1<<40)
	if ss.Window() != maxWindow {
		t.Fatalf("window %d", ss.Window())
	}
	wantFrames(t, s, fmt.Sprintf("WINDOW_UPDATE 1 +%d", maxWindow-DefaultWindow))
}

// Padding is credited although nobody takes it.
func TestPaddingIsGivenBack(t *testing.T) {
	_, s, _, ss := tunnelled(t, Config{})
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	total := 0
	for range 100 {
		must(fr.WriteDataPadded(1, false, []byte("x"), make([]byte, 255)))
		total += 257
	}
	ev := receive(t, s, b.Bytes())
	if len(ev) != 100 || ss.Buffered() != 100 {
		t.Fatalf("%d events, buffered %d", len(ev), ss.Buffered())
	}
	got := frames(t, s)
	if len(got) != 1 || int(ss.recvWin)+ss.Buffered() < DefaultWindow*3/4 {
		t.Fatalf("%v, window %d", got, ss.recvWin)
	}
}

func TestWritable(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	// Nobody asked: no event.
	if ev := receive(t, c, appendWindowUpdate(nil, 1, 1)); len(ev) != 0 {
		t.Fatal(ev)
	}
	receive(t, s, frameData(c, cs, make([]byte, DefaultWindow), false))
	if n := cs.Sendable(); n != 1 {
		t.Fatal(n)
	}
	cs.sendWin = 0
	if n := cs.Sendable(); n != 0 {
		t.Fatal(n)
	}
	// The connection's window is empty too: the stream's alone does not do.
	was := c.sendWin
	c.sendWin = 0
	if ev := receive(t, c, appendWindowUpdate(nil, 1, 10)); len(ev) != 0 {
		t.Fatal(ev)
	}
	if ev := receive(t, c, appendWindowUpdate(nil, 0, int(was))); len(ev) != 1 || ev[0].Kind != EventWritable || ev[0].Stream != cs || cs.Sendable() != 10 {
		t.Fatal(ev)
	}
	if ev := receive(t, c, appendWindowUpdate(nil, 0, 1)); len(ev) != 0 {
		t.Fatal(ev)
	}
	// SETTINGS may take a window below zero, and bring it back.
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	must(fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
	receive(t, c, b.Bytes())
	if cs.Sendable() != 0 || cs.sendWin >= 0 {
		t.Fatalf("window %d", cs.sendWin)
	}
	b.Reset()
	must(fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: DefaultWindow + 5}))
	if ev := receive(t, c, b.Bytes()); len(ev) != 1 || ev[0].Kind != EventWritable || cs.Sendable() != 15 {
		t.Fatalf("%v, sendable %d", ev, cs.Sendable())
	}
	_ = ss
}

func TestQueue(t *testing.T) {
	_, s, _, ss := tunnelled(t, Config{})
	var want []byte
	for i := range 300 {
		p := bytes.Repeat([]byte{byte(i)}, i*7)
		ss.Enqueue(p)
		want = append(want, p...)
	}
	if ss.QueuedBytes() != len(want) {
		t.Fatalf("%d bytes queued, want %d", ss.QueuedBytes(), len(want))
	}
	for n := 1; ss.QueuedBytes() > 0; n = n*3%5000 + 1 {
		if got := bytes.Join(ss.Queued(), nil); !bytes.Equal(got, want) {
			t.Fatalf("queue differs with %d bytes left", len(want))
		}
		for _, q := range ss.Queued() {
			if len(q) == 0 {
				t.Fatal("empty chunk")
			}
		}
		ss.Dequeue(n)
		want = want[min(n, len(want)):]
	}
	if ss.Queued() != nil {
		t.Fatal("an empty queue holds memory")
	}
	ss.Enqueue([]byte("x"))
	s.Reset(ss, http2.ErrCodeCancel)
	if ss.QueuedBytes() != 0 {
		t.Fatal("queued after a reset")
	}
}

func TestGoAwayRefusesWhatWasNotProcessed(t *testing.T) {
	c, s := pair(t, Config{}, Config{})
	var opened []*Stream
	for range 4 {
		st, err := c.Open(connectFields(), nil)
		if err != nil {
			t.Fatal(err)
		}
		opened = append(opened, st)
	}
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	must(fr.WriteGoAway(3, http2.ErrCodeNo, bytes.Repeat([]byte("d"), maxDebug+1)))
	ev := receive(t, c, b.Bytes())
	if d := cmp.Diff([]EventKind{EventGoAway, EventReset, EventReset}, kinds(ev)); d != "" {
		t.Fatal(d)
	}
	if ev[0].LastID != 3 || len(ev[0].Data) != maxDebug || ev[1].Stream != opened[2] || ev[2].Stream != opened[3] || ev[1].Code != http2.ErrCodeRefusedStream {
		t.Fatalf("%+v", ev)
	}
	b.Reset()
	must(fr.WriteGoAway(3, http2.ErrCodeNo, bytes.Repeat([]byte("d"), maxDebug))) // at the bound
	if ev := receive(t, c, b.Bytes()); len(ev) != 1 || len(ev[0].Data) != maxDebug {
		t.Fatalf("%+v", ev)
	}
	if _, err := c.Open(connectFields(), nil); err != ErrGoingAway {
		t.Fatal(err)
	}
	if c.CountStreams() != 2 || !opened[2].Closed() || opened[1].Closed() {
		t.Fatal("wrong streams closed")
	}
	_ = s
}

// After our GOAWAY the streams that are open go on, and what the peer opens is
// refused, its DATA ignored.
func TestGoAwaySent(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	s.GoAway(http2.ErrCodeNo, "bye")
	wantFrames(t, s, "GOAWAY 1 NO_ERROR bye")
	late, err := c.Open(connectFields(), nil)
	if err != nil {
		t.Fatal(err)
	}
	left := s.budget
	if ev := receive(t, s, append(take(c), frameData(c, late, []byte("x"), false)...)); len(ev) != 0 {
		t.Fatal(ev)
	}
	if s.budget != left-1 {
		t.Fatalf("budget %d of %d", s.budget, left)
	}
	if ev := receive(t, s, frameData(c, cs, []byte("x"), false)); len(ev) != 1 || ev[0].Stream != ss {
		t.Fatal(ev)
	}
	wantFrames(t, s, "RST_STREAM 3 REFUSED_STREAM")
	s.GoAway(http2.ErrCodeNo, "again")
	wantFrames(t, s, "GOAWAY 1 NO_ERROR again")
}

// A GOAWAY that is announced costs no stream that crosses it.
func TestGoAwayAnnounced(t *testing.T) {
	c, s, _, _ := tunnelled(t, Config{})
	c.AnnounceGoAway()
	wantFrames(t, c)
	s.AnnounceGoAway()
	announced := take(s)
	if _, err := c.Open(connectFields(), nil); err != nil { // it has not read that
		t.Fatal(err)
	}
	if ev := receive(t, s, take(c)); len(ev) != 1 || ev[0].Kind != EventHeaders {
		t.Fatal(ev)
	}
	if ev := receive(t, c, announced); len(ev) != 1 || ev[0].Kind != EventGoAway || ev[0].LastID != maxStreamID || ev[0].Code != http2.ErrCodeNo {
		t.Fatal(ev)
	}
	if _, err := c.Open(connectFields(), nil); err != ErrGoingAway {
		t.Fatal(err)
	}
	s.GoAway(http2.ErrCodeNo, "")
	last := take(s)
	s.AnnounceGoAway()
	wantFrames(t, s)
	if ev := receive(t, c, last); len(ev) != 1 || ev[0].LastID != 3 {
		t.Fatal(ev)
	}
}

func TestStreamLimitOfThePeer(t *testing.T) {
	c := New(Config{Client: true})
	for range assumedPeerStreams {
		if _, err := c.Open(connectFields(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Open(connectFields(), nil); err != ErrStreamLimit {
		t.Fatal(err)
	}
	s := New(Config{MaxConcurrentStreams: assumedPeerStreams + 1})
	ev := receive(t, c, take(s))
	if d := cmp.Diff([]EventKind{EventSettings, EventStreamsAvailable}, kinds(ev)); d != "" {
		t.Fatal(d)
	}
	if _, err := c.Open(connectFields(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Open(connectFields(), nil); err != ErrStreamLimit {
		t.Fatal(err)
	}
	if ev := receive(t, c, appendReset(nil, 1, http2.ErrCodeCancel)); len(ev) != 2 || ev[1].Kind != EventStreamsAvailable {
		t.Fatal(kinds(ev))
	}
	if _, err := c.Open(connectFields(), nil); err != nil {
		t.Fatal(err)
	}
}

func TestStreamIDsRunOut(t *testing.T) {
	c, s := pair(t, Config{}, Config{})
	c.nextID = maxStreamID
	st, err := c.Open(connectFields(), nil)
	if err != nil || st.ID() != maxStreamID {
		t.Fatal(err)
	}
	if _, err := c.Open(connectFields(), nil); err != ErrStreamIDs {
		t.Fatal(err)
	}
	if _, ev := pump(t, c, s); len(ev) != 1 {
		t.Fatal(ev)
	}
}

// A closed stream counts against the peer until its last byte is taken:
// otherwise what is queued would have no bound.
func TestUndrainedStreamsCount(t *testing.T) {
	c, s := pair(t, Config{}, Config{MaxConcurrentStreams: 1})
	cs, ss := another(t, c, s)
	s.End(ss)
	pump(t, c, s)
	ev := receive(t, s, frameData(c, cs, []byte("abc"), true))
	if !cs.Closed() || !ss.Closed() {
		t.Fatal("open")
	}
	ss.Enqueue(ev[0].Data)
	if _, err := c.Open(connectFields(), nil); err != nil {
		t.Fatal(err)
	}
	ofC, _ := pump(t, c, s)
	if len(ofC) != 1 || ofC[0].Code != http2.ErrCodeRefusedStream {
		t.Fatalf("%+v", ofC)
	}
	ss.Dequeue(3)
	s.Taken(ss, 3)
	another(t, c, s)
}

func TestRespondAfterTheEnd(t *testing.T) {
	c, s, cs, ss := tunnelled(t, Config{})
	s.End(ss)
	s.End(ss)
	if err := s.Respond(ss, okFields(), true); err != ErrStreamClosed {
		t.Fatal(err)
	}
	wantFrames(t, s, fmt.Sprintf("DATA 1 %v", http2.Flags(http2.FlagDataEndStream)))
	c.Reset(cs, http2.ErrCodeCancel)
	c.Reset(cs, http2.ErrCodeCancel)
	wantFrames(t, c, "RST_STREAM 1 CANCEL")
	if cs.Sendable() != 0 || !cs.LocalClosed() {
		t.Fatal("open")
	}
	if _, err := s.Open(connectFields(), nil); err != ErrServer {
		t.Fatal(err)
	}
}

func TestPong(t *testing.T) {
	c, s := pair(t, Config{}, Config{})
	c.Ping([8]byte([]byte("12345678")))
	ev, _ := pump(t, c, s)
	if len(ev) != 1 || ev[0].Kind != EventPong || string(ev[0].Data) != "12345678" {
		t.Fatal(ev)
	}
}

// A header block longer than a frame that every peer accepts goes on in
// CONTINUATION frames.
func TestLongRequest(t *testing.T) {
	c, s := pair(t, Config{}, Config{MaxHeaderBytes: 100 << 10})
	fields := connectFields()
	fields[2].Value = string(bytes.Repeat([]byte("%"), 60<<10)) // no saving by Huffman
	if _, err := c.Open(fields, nil); err != nil {
		t.Fatal(err)
	}
	_, ev := pump(t, c, s)
	if len(ev) != 1 || len(ev[0].Headers[2].Value) != 60<<10 {
		t.Fatal(len(ev))
	}
	fields[2].Value += fields[2].Value
	if _, err := c.Open(fields, nil); err != ErrHeaderSize {
		t.Fatal(err)
	}
}

// Connections that share a Scratch hold no memory for events.
func TestShare(t *testing.T) {
	c, s, cs, _ := tunnelled(t, Config{})
	var both Scratch
	c.Share(&both)
	s.Share(&both)
	first, err := s.Receive(frameData(c, cs, []byte("x"), false))
	if err != nil || len(first) != 1 || c.events != nil || s.events != nil {
		t.Fatal(first, err)
	}
	second, err := c.Receive(appendReset(nil, 1, http2.ErrCodeCancel))
	if err != nil || len(second) != 1 || &first[0] != &second[0] {
		t.Fatal(second, err)
	}
}
