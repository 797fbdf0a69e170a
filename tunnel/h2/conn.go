// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// mode is what the next byte of input belongs to.
type mode uint8

const (
	modePreface mode = iota // the client's connection preface
	modeHeader              // a frame's header
	modePadLen              // the pad length of a DATA frame
	modeData                // the data of a DATA frame
	modeSkip                // what is not looked at: padding, DATA of no stream, unknown frames
	modeGather              // the payload of any other frame
)

// Conn is one end of an HTTP/2 connection.
type Conn struct {
	cfg Config
	err *ConnError

	// Input.
	mode    mode
	preface uint8 // bytes of the client's preface seen
	partial [FrameHeaderLen]byte
	have    uint8       // bytes in partial
	frames  uint64      // begun so far
	frame   frameHeader // the present one
	left    int         // bytes of it that the mode still waits for
	pad     int         // bytes of padding behind the data of the present DATA frame
	cur     *Stream     // whose DATA it is; nil: nobody's
	gather  []byte      // a begun payload
	events  []Event     // of the present Receive
	scratch *Scratch
	meter   func(n int) // told of the queues' memory; nil: nobody is
	held    int         // bytes of that

	// A header block whose end has not come.
	block       []byte
	blockID     uint32 // 0: none
	blockEnd    bool   // it carries END_STREAM
	blockFrames int

	// HPACK.
	dec        *hpack.Decoder
	fields     []hpack.HeaderField // decoded so far
	listSize   int
	listFields int
	tableSize  uint32 // of the peer's encoder, as its last update said
	wantUpdate bool   // the next block must begin by setting it to 0
	enc        *hpack.Encoder
	encoded    blockBuffer

	// Output.
	ctl     []byte
	ctlOff  int // consumed of ctl
	replies int // bytes of ctl that the peer made us queue, at most

	// Streams.
	streams  map[uint32]*Stream
	peak     int     // of len(streams)
	last     *Stream // the last one looked up
	nextID   uint32  // of the stream that Open makes
	peerID   uint32  // the highest that the peer opened
	opened   int     // of ours, not closed
	accepted int     // of the peer's, not forgotten
	limited  bool    // ErrStreamLimit was returned

	// Flow control of the connection.
	sendWin int64
	recvWin int
	recvDue int // received and not yet given back
	late    int // bytes that may still come for streams that we reset

	// The peer's settings.
	settled        bool // they came
	peerStreams    uint32
	peerWindow     int
	peerHeaderList uint64
	peerTable      uint32

	acked     bool // it acknowledged ours
	pings     int  // of ours without an answer
	budget    int
	earned    int // bytes towards the next unit of budget
	updates   int // WINDOW_UPDATE frames that bytes of ours have earned
	goneLast  uint32
	goneSent  bool
	gonePeer  bool // a GOAWAY came
	goneLimit uint32
}

type frameHeader struct {
	length int
	typ    http2.FrameType
	flags  http2.Flags
	id     uint32
}

// Scratch is memory for the events of one Receive, and a stock of chunks for
// what is queued. Connections that are used by one thread may share one, by
// Share: then a connection at rest holds none, and events are valid until the
// next Receive of any of them. Its zero value is ready for use.
type Scratch struct {
	events []Event
	chunks [][]byte // of maxChunk, empty
}

// Share makes the connection use memory that others may use too.
func (c *Conn) Share(s *Scratch) { c.scratch = s }

// New makes a connection and queues what it begins with: the preface of a
// client, SETTINGS, and the connection's window.
func New(cfg Config) *Conn {
	if cfg.MaxConcurrentStreams == 0 {
		cfg.MaxConcurrentStreams = DefaultMaxStreams
	}
	if cfg.InitialWindow == 0 {
		cfg.InitialWindow = DefaultWindow
	}
	cfg.InitialWindow = min(max(cfg.InitialWindow, protocolWindow), maxWindow)
	if cfg.MaxHeaderBytes <= 0 {
		cfg.MaxHeaderBytes = DefaultMaxHeaderBytes
	}
	c := &Conn{
		cfg:            cfg,
		mode:           modePreface,
		scratch:        new(Scratch),
		streams:        make(map[uint32]*Stream),
		nextID:         1,
		sendWin:        protocolWindow,
		recvWin:        ConnWindow,
		peerStreams:    assumedPeerStreams,
		peerWindow:     protocolWindow,
		peerHeaderList: 1<<64 - 1,
		peerTable:      defaultTableSize,
		tableSize:      defaultTableSize,
		budget:         maxBudget,
		goneLimit:      maxStreamID,
	}
	if cfg.Client {
		c.mode = modeHeader
		c.ctl = append(c.ctl, http2.ClientPreface...)
	}
	c.newCodec()
	settings := []http2.Setting{
		{ID: http2.SettingHeaderTableSize, Val: 0},
		{ID: http2.SettingMaxConcurrentStreams, Val: cfg.MaxConcurrentStreams},
		{ID: http2.SettingInitialWindowSize, Val: cfg.InitialWindow},
		{ID: http2.SettingMaxFrameSize, Val: MaxDataFrame},
		{ID: http2.SettingMaxHeaderListSize, Val: uint32(cfg.MaxHeaderBytes)},
	}
	if cfg.Client {
		settings = append(settings, http2.Setting{ID: http2.SettingEnablePush, Val: 0})
	}
	c.ctl = appendFrameHeader(c.ctl, 6*len(settings), http2.FrameSettings, 0, 0)
	for _, s := range settings {
		c.ctl = binary.BigEndian.AppendUint16(c.ctl, uint16(s.ID))
		c.ctl = binary.BigEndian.AppendUint32(c.ctl, s.Val)
	}
	c.ctl = appendWindowUpdate(c.ctl, 0, ConnWindow-protocolWindow)
	return c
}

// Receive takes bytes from the peer, split anywhere, and returns what they
// mean. All of p is used. The events are valid until the next call, what they
// alias as long as p is. An error is a *ConnError; the events before it are
// returned with it, a GOAWAY is queued in Control, and every later call
// returns the same error.
func (c *Conn) Receive(p []byte) ([]Event, error) {
	if c.err != nil {
		return nil, c.err
	}
	c.events = c.scratch.events[:0]
	for len(p) > 0 && c.err == nil {
		switch c.mode {
		case modeHeader:
			if c.have == 0 && len(p) >= FrameHeaderLen {
				c.begin((*[FrameHeaderLen]byte)(p))
				p = p[FrameHeaderLen:]
				continue
			}
			n := copy(c.partial[c.have:], p)
			c.have += uint8(n)
			p = p[n:]
			if c.have == FrameHeaderLen {
				c.have = 0
				c.begin(&c.partial)
			}
		case modeData:
			n := min(c.left, len(p))
			c.data(p[:n:n])
			p = p[n:]
			if c.left -= n; c.left == 0 {
				c.endData()
			}
		case modeGather:
			if len(c.gather) == 0 && len(p) >= c.left {
				n := c.left
				c.left = 0
				c.mode = modeHeader
				c.whole(p[:n:n])
				p = p[n:]
				continue
			}
			n := min(c.left, len(p))
			c.gather = append(c.gather, p[:n]...)
			p = p[n:]
			if c.left -= n; c.left == 0 {
				whole := c.gather
				c.gather = nil
				c.mode = modeHeader
				c.whole(whole)
			}
		case modeSkip:
			n := min(c.left, len(p))
			p = p[n:]
			if c.left -= n; c.left == 0 {
				c.endData()
			}
		case modePadLen:
			c.padLength(int(p[0]))
			p = p[1:]
		case modePreface:
			n := min(len(p), len(http2.ClientPreface)-int(c.preface))
			if string(p[:n]) != http2.ClientPreface[c.preface:int(c.preface)+n] {
				c.fail(http2.ErrCodeProtocol, "no HTTP/2 connection preface")
				continue
			}
			c.preface += uint8(n)
			p = p[n:]
			if int(c.preface) == len(http2.ClientPreface) {
				c.mode = modeHeader
			}
		}
	}
	if c.limited && uint32(c.opened) < c.peerStreams && c.err == nil {
		c.limited = false
		c.events = append(c.events, Event{Kind: EventStreamsAvailable})
	}
	events := c.events
	c.events, c.scratch.events = nil, nil
	if cap(events) <= keepEvents {
		c.scratch.events = events[:0]
	}
	if c.err != nil {
		return events, c.err
	}
	return events, nil
}

// begin acts on a frame's header.
func (c *Conn) begin(h *[FrameHeaderLen]byte) {
	f := frameHeader{
		length: int(h[0])<<16 | int(h[1])<<8 | int(h[2]),
		typ:    http2.FrameType(h[3]),
		flags:  http2.Flags(h[4]),
		id:     binary.BigEndian.Uint32(h[5:]) & maxStreamID,
	}
	c.frame = f
	c.left = f.length
	c.frames++
	switch {
	case f.length > MaxDataFrame:
		c.failf(http2.ErrCodeFrameSize, "%v frame of %d bytes", f.typ, f.length)
		return
	case c.blockID != 0 && (f.typ != http2.FrameContinuation || f.id != c.blockID):
		c.failf(http2.ErrCodeProtocol, "%v frame on stream %d inside the header block of stream %d", f.typ, f.id, c.blockID)
		return
	case !c.settled && (f.typ != http2.FrameSettings || f.flags.Has(http2.FlagSettingsAck)):
		c.failf(http2.ErrCodeProtocol, "begins with %v instead of SETTINGS", f.typ)
		return
	case f.typ == http2.FrameData:
		c.beginData()
		return
	case f.typ > http2.FrameContinuation: // unknown: ignored, RFC 9113, section 4.1
		if c.charge() {
			c.skip()
		}
		return
	case f.length > MaxOtherFrame:
		c.failf(http2.ErrCodeFrameSize, "%v frame of %d bytes", f.typ, f.length)
		return
	case f.length == 0:
		c.whole(nil)
		return
	}
	c.mode = modeGather
}

// whole acts on a frame that is not DATA.
func (c *Conn) whole(p []byte) {
	switch c.frame.typ {
	case http2.FrameWindowUpdate:
		c.windowUpdate(p)
	case http2.FrameHeaders:
		c.headers(p)
	case http2.FrameContinuation:
		c.continuation(p)
	case http2.FrameRSTStream:
		c.rstStream(p)
	case http2.FrameSettings:
		c.settings(p)
	case http2.FramePing:
		c.ping(p)
	case http2.FrameGoAway:
		c.goAway(p)
	case http2.FramePriority:
		c.priority(p)
	case http2.FramePushPromise:
		// No client accepts it from us, and we switched it off.
		c.fail(http2.ErrCodeProtocol, "PUSH_PROMISE, which is switched off")
	}
}

// skip passes over the rest of the present frame.
func (c *Conn) skip() {
	if c.mode = modeSkip; c.left == 0 {
		c.mode = modeHeader
	}
}

func (c *Conn) rstStream(p []byte) {
	id := c.frame.id
	switch {
	case id == 0:
		c.fail(http2.ErrCodeProtocol, "RST_STREAM on stream 0")
		return
	case len(p) != 4:
		c.failf(http2.ErrCodeFrameSize, "RST_STREAM of %d bytes", len(p))
		return
	case c.idle(id):
		c.failf(http2.ErrCodeProtocol, "RST_STREAM on idle stream %d", id)
		return
	case !c.charge():
		return
	}
	if s := c.lookup(id); s != nil {
		code := http2.ErrCode(binary.BigEndian.Uint32(p))
		if s.remoteClosed && code == http2.ErrCodeNo {
			// The peer has said all and wants no more of us: RFC 9113,
			// section 8.1. What it said is not to be thrown away.
			s.localClosed = true
			c.closeIfEnded(s)
		} else {
			c.drop(s)
		}
		c.events = append(c.events, Event{Kind: EventReset, Stream: s, Code: code})
	}
}

func (c *Conn) ping(p []byte) {
	switch {
	case c.frame.id != 0:
		c.fail(http2.ErrCodeProtocol, "PING on a stream")
	case len(p) != 8:
		c.failf(http2.ErrCodeFrameSize, "PING of %d bytes", len(p))
	case !c.frame.flags.Has(http2.FlagPingAck):
		c.ctl = appendFrameHeader(c.ctl, 8, http2.FramePing, http2.FlagPingAck, 0)
		c.ctl = append(c.ctl, p...)
		c.reply(FrameHeaderLen + 8)
	case c.pings == 0:
		c.charge()
	default:
		c.pings--
		c.events = append(c.events, Event{Kind: EventPong, Data: p})
	}
}

func (c *Conn) priority(p []byte) {
	switch {
	case c.frame.id == 0:
		c.fail(http2.ErrCodeProtocol, "PRIORITY on stream 0")
	case !c.charge():
	case len(p) != 5:
		c.streamError(c.frame.id, http2.ErrCodeFrameSize)
	}
}

func (c *Conn) goAway(p []byte) {
	switch {
	case c.frame.id != 0:
		c.fail(http2.ErrCodeProtocol, "GOAWAY on a stream")
		return
	case len(p) < 8:
		c.failf(http2.ErrCodeFrameSize, "GOAWAY of %d bytes", len(p))
		return
	case !c.charge():
		return
	}
	last := binary.BigEndian.Uint32(p) & maxStreamID
	if c.gonePeer && last > c.goneLimit {
		c.failf(http2.ErrCodeProtocol, "GOAWAY raises the last stream from %d to %d", c.goneLimit, last)
		return
	}
	c.gonePeer = true
	c.goneLimit = last
	debug := p[8:]
	c.events = append(c.events, Event{
		Kind: EventGoAway, LastID: last, Code: http2.ErrCode(binary.BigEndian.Uint32(p[4:])), Data: debug[:min(len(debug), maxDebug)],
	})
	// What the peer did not process can be tried elsewhere: RFC 9113, 8.7.
	var refused []*Stream
	for id, s := range c.streams {
		if id > last && c.ours(id) && !s.closed {
			refused = append(refused, s)
		}
	}
	slices.SortFunc(refused, byID)
	for _, s := range refused {
		c.drop(s)
		c.events = append(c.events, Event{Kind: EventReset, Stream: s, Code: http2.ErrCodeRefusedStream})
	}
}

// fail ends the connection.
func (c *Conn) fail(code http2.ErrCode, detail string) {
	if c.err != nil {
		return
	}
	c.err = &ConnError{Code: code, Detail: detail}
	c.appendGoAway(code, detail)
}

func (c *Conn) failf(code http2.ErrCode, format string, args ...any) {
	c.fail(code, fmt.Sprintf(format, args...))
}

// reply notes that the peer made us queue n bytes.
func (c *Conn) reply(n int) {
	if c.replies += n; c.replies > maxReplies {
		c.fail(http2.ErrCodeEnhanceYourCalm, "replies are not read")
	}
}

// charge takes one from the budget for frames of no use, and reports whether
// there was one.
func (c *Conn) charge() bool {
	if c.budget < 1 {
		c.fail(http2.ErrCodeEnhanceYourCalm, "too many frames of no use")
		return false
	}
	c.budget--
	return true
}

// earn gives the budget back for useful bytes.
func (c *Conn) earn(n int) {
	if c.budget == maxBudget {
		return
	}
	c.earned += n
	c.budget = min(maxBudget, c.budget+c.earned/earnBytes)
	c.earned %= earnBytes
}

// Refill gives the whole budget for frames of no use back. Call it now and
// then, such as each second: it makes of the budget a rate.
func (c *Conn) Refill() { c.budget = maxBudget }

// Frames is how many frames the peer has begun.
func (c *Conn) Frames() uint64 { return c.frames }

// Err is the error that ended the connection, or nil.
func (c *Conn) Err() error {
	if c.err == nil {
		return nil
	}
	return c.err
}
