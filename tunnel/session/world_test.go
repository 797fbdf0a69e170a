// SPDX-License-Identifier: Apache-2.0

package session_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"math/rand/v2"
	"slices"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/session"
)

// world is two sessions that talk through sockets which take and give what they
// like, and the applications behind their streams. Everything that happens in it
// follows from its seed.
type world struct {
	seed  uint64
	rng   *rand.Rand
	ends  [2]*side // client, server
	calm  bool     // nobody resets a stream or goes away
	eager bool     // at the end: everybody takes and sends what there is

	freezes int
	spoil   func(*session.State) bool // changes a frozen state once, and reports that it did
	spoilt  bool
	updates int            // KeyUpdates sent
	whole   int            // directions of streams that came whole
	bytes   int            // that came
	seen    map[string]int // in what states sessions were frozen
}

// side is one session and its socket.
type side struct {
	w      *world
	client bool
	s      *session.Session
	peer   *side
	out    []byte // sealed, not yet taken by the socket
	in     []byte // of the socket, not yet opened
	slot   [record.SlotLen]byte
	apps   map[uint32]*app
	ids    []uint32 // of apps, in order
	quiet  bool     // a GOAWAY came or went
}

// app is one side's end of a stream.
type app struct {
	id     uint32
	st     *h2.Stream // nil when the stream is gone
	source *rand.ChaCha8
	left   int // bytes to be sent
	total  int
	got    hash.Hash
	count  int // bytes got
	stuck  bool
	opened bool // the request has been answered
	fin    bool // the peer's end came
	reset  bool // by either side
}

// content is what one end of a stream sends.
func content(seed uint64, id uint32, client bool) *rand.ChaCha8 {
	var key [32]byte
	copy(key[:], fmt.Sprintf("%016x%08x%v", seed, id, client))
	return rand.NewChaCha8(key)
}

// failure is what breaks a world.
type failure struct{ error }

func failf(format string, args ...any) { panic(failure{fmt.Errorf(format, args...)}) }

func newWorld(seed uint64) *world {
	w := &world{seed: seed, rng: rand.New(rand.NewPCG(seed, 0)), seen: map[string]int{}}
	suites := []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256}
	w.join(suites[w.rng.IntN(len(suites))])
	return w
}

// join makes the two sessions.
func (w *world) join(suite uint16) {
	size := 32
	if suite == tls.TLS_AES_256_GCM_SHA384 {
		size = 48
	}
	secrets := [2][]byte{make([]byte, size), make([]byte, size)}
	for _, s := range secrets {
		for i := range s {
			s[i] = byte(w.rng.Uint32())
		}
	}
	for i, client := range []bool{true, false} {
		layer, err := record.New(record.Secrets{
			Suite: suite, Client: client, Read: slices.Clone(secrets[i]), Write: slices.Clone(secrets[1-i]),
		})
		if err != nil {
			panic(err)
		}
		conn := h2.New(h2.Config{Client: client, MaxConcurrentStreams: 20, MaxHeaderBytes: 64 << 10})
		w.ends[i] = &side{w: w, client: client, s: session.New(layer, conn, nil), apps: map[uint32]*app{}}
	}
	w.ends[0].peer, w.ends[1].peer = w.ends[1], w.ends[0]
}

// chance is true once in n.
func (w *world) chance(n int) bool { return w.rng.IntN(n) == 0 }

// run lets the world live for a number of steps, freezing at some of them, then
// lets everything end and judges it.
func (w *world) run(steps, freezes int) (err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case failure:
			err = p.error
		default:
			panic(p)
		}
	}()
	at := make([]int, freezes)
	for i := range at {
		at[i] = w.rng.IntN(steps)
	}
	slices.Sort(at)
	for i := range steps {
		w.ends[w.rng.IntN(2)].step(i*4 > steps*3)
		for len(at) > 0 && at[0] <= i {
			at = at[1:]
			w.ends[w.rng.IntN(2)].freeze()
		}
	}
	w.eager = true
	for range 20_000 {
		before := w.progress()
		for _, e := range w.ends {
			e.settle()
		}
		if w.progress() == before {
			break
		}
	}
	w.judge()
	return nil
}

// progress changes for as long as anything goes on.
func (w *world) progress() string {
	var b strings.Builder
	for _, e := range w.ends {
		fmt.Fprint(&b, len(e.in), " ", len(e.out), " ", len(e.s.H2.Control()), ";")
		for _, id := range e.ids {
			a := e.apps[id]
			fmt.Fprint(&b, a.left, " ", a.count, " ", a.fin, ";")
		}
	}
	return b.String()
}

// step does one thing of many.
func (e *side) step(late bool) {
	w := e.w
	switch n := w.rng.IntN(100); {
	case n < 25:
		e.transmit()
	case n < 55:
		e.receive(1 + w.rng.IntN(3))
	case n < 75:
		if a := e.any(); a != nil {
			e.send(a)
		}
	case n < 85:
		if a := e.any(); a != nil {
			e.take(a, 1+w.rng.IntN(40_000))
		}
	case n < 91 && e.client:
		e.open()
	case n < 91:
		if a := e.any(); a != nil {
			e.answer(a)
		}
	case n < 93:
		e.out = e.s.Records.UpdateKeys(e.out, w.chance(2))
		w.updates++
	case n < 95:
		if a := e.any(); a != nil && a.st != nil {
			e.s.H2.SetWindow(a.st, 1+w.rng.IntN(1<<20))
		}
	case n < 96:
		e.s.H2.Ping([8]byte{byte(n)})
	case n < 97:
		if a := e.any(); a != nil && a.st != nil && w.chance(3) && !w.calm {
			e.s.H2.Reset(a.st, http2.ErrCodeCancel)
			a.st, a.reset = nil, true
		}
	case n < 98 && late && w.chance(20) && !w.calm:
		e.s.H2.GoAway(http2.ErrCodeNo, "maintenance")
		e.quiet = true
	default:
		e.flush(nil)
	}
}

// settle does everything that can be done.
func (e *side) settle() {
	for _, id := range e.ids {
		a := e.apps[id]
		e.answer(a)
		e.take(a, 1<<30)
		e.send(a)
	}
	e.flush(nil)
	e.peer.in = append(e.peer.in, e.out...)
	e.out = nil
	e.peer.receive(1 << 30)
}

func (e *side) any() *app {
	if len(e.ids) == 0 {
		return nil
	}
	return e.apps[e.ids[e.w.rng.IntN(len(e.ids))]]
}

func (e *side) add(st *h2.Stream) *app {
	w := e.w
	a := &app{id: st.ID(), st: st, source: content(w.seed, st.ID(), e.client), got: sha256.New(), stuck: w.chance(4)}
	switch w.rng.IntN(3) {
	case 0:
		a.total = w.rng.IntN(200)
	case 1:
		a.total = w.rng.IntN(20_000)
	default:
		a.total = w.rng.IntN(200_000)
	}
	a.left = a.total
	e.apps[a.id] = a
	e.ids = append(e.ids, a.id)
	return a
}

func (e *side) open() {
	fields := []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "10.0.0.1:80"}}
	if e.w.chance(4) { // longer than a frame: CONTINUATION
		fields = append(fields, hpack.HeaderField{Name: "long", Value: strings.Repeat("x", 17_000+e.w.rng.IntN(40_000))})
	}
	st, err := e.s.H2.Open(fields, nil)
	switch {
	case errors.Is(err, h2.ErrStreamLimit), errors.Is(err, h2.ErrGoingAway) && (e.quiet || e.peer.quiet):
		return
	case err != nil:
		failf("open: %w", err)
	}
	e.add(st)
}

func (e *side) answer(a *app) {
	if e.client || a.opened || a.st == nil || a.st.LocalClosed() {
		return
	}
	if err := e.s.H2.Respond(a.st, []hpack.HeaderField{{Name: ":status", Value: "200"}}, false); err != nil {
		failf("respond: %w", err)
	}
	a.opened = true
}

// send seals data of an application, behind what waits before it.
func (e *side) send(a *app) {
	if a.st == nil || a.st.LocalClosed() || !e.client && !a.opened {
		return
	}
	n := min(a.left, a.st.Sendable(), 1+e.w.rng.IntN(16<<10))
	end := n == a.left && e.w.chance(2)
	if n == 0 && a.left == 0 {
		e.s.H2.End(a.st)
		e.flush(nil)
		return
	}
	if n == 0 && !end {
		return
	}
	e.flush(func() []byte {
		b := make([]byte, h2.FrameHeaderLen+n)
		_, _ = a.source.Read(b[h2.FrameHeaderLen:])
		a.left -= n
		e.s.H2.PutData(b, a.st, n, end)
		return b
	})
}

// flush seals what is due: control records, control frames, then data. Records
// end where they like.
func (e *side) flush(data func() []byte) {
	e.out = e.s.Records.Due(e.out)
	slot := e.slot[:]
	var plain []byte
	for len(e.s.H2.Control()) > 0 {
		used := e.w.rng.IntN(record.MaxPlaintext)
		n := e.s.FillControl(slot, used)
		plain = append(plain, slot[record.HeaderLen+used:record.HeaderLen+used+n]...)
	}
	if data != nil {
		plain = append(plain, data()...)
	}
	for len(plain) > 0 {
		n := min(len(plain), 1+e.w.rng.IntN([]int{20, 1000, record.MaxPlaintext}[e.w.rng.IntN(3)]))
		copy(slot[record.HeaderLen:], plain[:n])
		sealed := e.s.Records.Seal(slot, n)
		if sealed == 0 {
			failf("nothing is sealed")
		}
		e.out = append(e.out, slot[:sealed]...)
		plain = plain[n:]
	}
}

// transmit is the socket: it takes what it likes.
func (e *side) transmit() {
	n := min(len(e.out), 1+e.w.rng.IntN([]int{30, 3000, 100_000}[e.w.rng.IntN(3)]))
	e.peer.in = append(e.peer.in, e.out[:n]...)
	e.out = e.out[n:]
}

// receive opens up to a number of records.
func (e *side) receive(records int) {
	for range records {
		n, events, err := e.s.Next(e.in)
		if err != nil {
			failf("receive: %w", err)
		}
		if n == 0 {
			return
		}
		for i := range events {
			e.event(&events[i])
		}
		clear(e.in[:n]) // what was given out is no longer valid
		e.in = e.in[n:]
	}
}

func (e *side) event(ev *h2.Event) {
	var a *app
	if ev.Stream != nil {
		if a = e.apps[ev.Stream.ID()]; a == nil {
			if e.client || ev.Kind != h2.EventHeaders {
				failf("event %d of an unknown stream %d", ev.Kind, ev.Stream.ID())
			}
			a = e.add(ev.Stream)
		}
		if a.st != nil && a.st != ev.Stream {
			failf("stream %d is another one", a.id)
		}
	}
	switch ev.Kind {
	case h2.EventHeaders:
		if e.client {
			a.opened = true
		}
	case h2.EventData:
		if a.fin || a.reset {
			failf("stream %d: data behind its end", a.id)
		}
		a.st.Enqueue(ev.Data)
		if !a.stuck && e.w.chance(2) {
			e.take(a, len(ev.Data))
		}
	case h2.EventEnd:
		if a.fin {
			failf("stream %d ended twice", a.id)
		}
		a.fin = true
	case h2.EventReset:
		if ev.Local {
			failf("stream %d was broken: %v", a.id, ev.Code)
		}
		a.st, a.reset = nil, true
	}
}

// take is the application reading.
func (e *side) take(a *app, limit int) {
	if a.st == nil || a.stuck && !e.w.eager {
		return
	}
	for limit > 0 && a.st.QueuedBytes() > 0 {
		p := a.st.Queued()[0]
		p = p[:min(len(p), limit)]
		a.got.Write(p)
		n := len(p)
		a.count += n
		limit -= n
		a.st.Dequeue(n)
		e.s.H2.Taken(a.st, n)
	}
}

// freeze takes the session over into another one, through an encoding.
func (e *side) freeze() {
	w := e.w
	w.freezes++
	e.s.Keep(e.in)
	st := e.s.Freeze(e.out)
	if _, _, err := e.s.Next(bytes.Clone(e.in)); err == nil {
		failf("a frozen session is still in use")
	}
	w.note(&st)
	st = carry(st, w.chance(2))
	if w.spoil != nil && !w.spoilt {
		w.spoilt = w.spoil(&st)
	}
	s, streams, err := session.Thaw(st)
	if err != nil {
		failf("thaw: %w", err)
	}
	e.s = s
	e.out = bytes.Clone(s.Unsent())
	if len(s.Unsent()) != 0 {
		failf("what is unsent is given out twice")
	}
	e.in = make([]byte, s.Pending())
	s.Restore(e.in)
	thawed := map[uint32]*h2.Stream{}
	for _, st := range streams {
		thawed[st.ID()] = st
	}
	for _, id := range e.ids {
		a := e.apps[id]
		if a.st == nil {
			continue
		}
		was := a.st
		a.st = thawed[id]
		delete(thawed, id)
		if a.st == nil && !(was.Closed() && was.QueuedBytes() == 0) {
			failf("stream %d was lost", id)
		}
	}
	if len(thawed) > 0 {
		failf("%d streams appeared", len(thawed))
	}
}

// carry takes a state through an encoding.
func carry(st session.State, asJSON bool) session.State {
	var b bytes.Buffer
	var out session.State
	if asJSON {
		if err := json.NewEncoder(&b).Encode(st); err != nil {
			failf("encode: %w", err)
		}
		if err := json.NewDecoder(&b).Decode(&out); err != nil {
			failf("decode: %w", err)
		}
		return out
	}
	if err := gob.NewEncoder(&b).Encode(st); err != nil {
		failf("encode: %w", err)
	}
	if err := gob.NewDecoder(&b).Decode(&out); err != nil {
		failf("decode: %w", err)
	}
	return out
}

// note counts what the frozen session was in the middle of.
func (w *world) note(st *session.State) {
	count := func(what string, is bool) {
		if is {
			w.seen[what]++
		}
	}
	f := &st.H2
	inFrame := f.Left > 0
	count("a record", len(st.Partial) > 0)
	count("unsent bytes", len(st.Unsent) > 0)
	count("a frame's header", len(f.Partial) > 0)
	count("DATA", inFrame && f.Current != 0)
	count("another frame", inFrame && len(f.Gather) > 0)
	count("a CONTINUATION frame", inFrame && len(f.Gather) > 0 && http2.FrameType(f.FrameType) == http2.FrameContinuation)
	count("a header block", f.BlockID != 0)
	count("control frames", len(f.Control) > 0)
	count("the first SETTINGS", !f.Settled)
	count("a KeyUpdate that is owed", st.Records.Reply)
	count("a KeyUpdate that is awaited", st.Records.Asked)
	for _, s := range f.Streams {
		count("queued bytes", len(s.Queue) > 0)
		count("an exhausted window", s.Starved && s.SendWindow <= 0 && !s.LocalClosed)
		count("a full receive window", s.ReceiveWindow == 0 && s.Buffered > 0)
		count("a half-closed stream", s.LocalClosed != s.RemoteClosed)
		count("a closed stream with bytes left", s.Closed && len(s.Queue) > 0)
	}
}

// judge compares, for each direction of each stream, what came with what was
// sent: the whole, or where it was reset a prefix.
func (w *world) judge() {
	for _, e := range w.ends {
		for _, id := range e.ids {
			from := e.apps[id]
			to := e.peer.apps[id]
			if to == nil {
				if !from.reset {
					failf("stream %d never came", id)
				}
				continue
			}
			sum := sha256.New()
			b := make([]byte, to.count)
			_, _ = content(w.seed, id, e.client).Read(b)
			sum.Write(b)
			switch {
			case !bytes.Equal(sum.Sum(nil), to.got.Sum(nil)):
				failf("stream %d: what came is not what was sent, in %d bytes", id, to.count)
			case from.reset || to.reset:
			case to.count != from.total || from.left != 0 || !to.fin:
				failf("stream %d: %d bytes of %d came, %d not sent, ended: %v", id, to.count, from.total, from.left, to.fin)
			default:
				w.whole++
			}
			w.bytes += to.count
		}
		if len(e.in)+len(e.out) > 0 {
			failf("%d bytes are left that cannot be opened", len(e.in)+len(e.out))
		}
	}
}
