// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"cmp"
	"encoding/binary"
	"math"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Stream is a stream of a connection.
type Stream struct {
	User any // the owner's

	c  *Conn
	id uint32

	sendWin  int32 // what we may send, bytes; below 0 after the peer lowered its setting
	recvWin  int32 // what the peer may send
	target   int32 // what recvWin and buffered are to be together
	buffered int32 // received and not yet taken

	localClosed  bool // END_STREAM was queued
	remoteClosed bool // END_STREAM came
	closed       bool
	reset        bool // closed by a reset, of either side
	gotHeaders   bool // of the peer
	sentHeaders  bool
	connected    bool // the answer was 2xx
	starved      bool // Sendable was 0: report when it no longer is

	queue queue
}

func byID(a, b *Stream) int { return cmp.Compare(a.id, b.id) }

// ID is the stream's identifier.
func (s *Stream) ID() uint32 { return s.id }

// LocalClosed reports whether we ended our half.
func (s *Stream) LocalClosed() bool { return s.localClosed || s.closed }

// Closed reports whether both halves are closed, or the stream was reset. What
// was received before may still be queued.
func (s *Stream) Closed() bool { return s.closed }

// Sendable is how many bytes may be sent now. When it says 0 for lack of a
// window, an EventWritable follows.
func (s *Stream) Sendable() int {
	if s.localClosed || s.closed {
		return 0
	}
	n := min(int64(s.sendWin), s.c.sendWin)
	if n <= 0 {
		s.starved = true
		return 0
	}
	return int(n)
}

// Window is the stream's target receive window, in bytes.
func (s *Stream) Window() int { return int(s.target) }

// Buffered is how many bytes were received and not yet taken.
func (s *Stream) Buffered() int { return int(s.buffered) }

// ours reports whether an identifier is of our own numbering.
func (c *Conn) ours(id uint32) bool { return c.cfg.Client == (id%2 == 1) }

// idle reports whether no stream of this identifier was ever opened.
func (c *Conn) idle(id uint32) bool {
	switch {
	case id%2 == 0: // a server opens none
		return true
	case c.cfg.Client:
		return id >= c.nextID
	default:
		return id > c.peerID
	}
}

// lookup finds a stream that is not closed.
func (c *Conn) lookup(id uint32) *Stream {
	s := c.last
	if s == nil || s.id != id {
		if s = c.streams[id]; s == nil {
			return nil
		}
		c.last = s
	}
	if s.closed {
		return nil
	}
	return s
}

func (c *Conn) newStream(id uint32) *Stream {
	s := &Stream{
		c:       c,
		id:      id,
		sendWin: int32(c.peerWindow),
		recvWin: int32(c.cfg.InitialWindow),
		target:  int32(c.cfg.InitialWindow),
	}
	c.streams[id] = s
	c.peak = max(c.peak, len(c.streams))
	return s
}

// forget lets go of a stream. One of the peer's counts until then, also when
// closed, so that what is queued stays bounded.
func (c *Conn) forget(s *Stream) {
	if c.streams[s.id] != s {
		return
	}
	delete(c.streams, s.id)
	if c.last == s {
		c.last = nil
	}
	if !c.ours(s.id) {
		c.accepted--
	}
	if len(c.streams) == 0 && c.peak > keepStreams {
		c.streams, c.peak = make(map[uint32]*Stream), 0
	}
}

func (c *Conn) close(s *Stream) {
	s.closed = true
	if c.ours(s.id) {
		c.opened--
	}
}

// closeIfEnded closes a stream whose halves both ended. It is remembered until
// its last byte has been taken, so that a freeze does not lose it.
func (c *Conn) closeIfEnded(s *Stream) {
	if !s.localClosed || !s.remoteClosed || s.closed {
		return
	}
	c.close(s)
	if s.buffered == 0 {
		c.forget(s)
	}
}

// drop closes a stream at once.
func (c *Conn) drop(s *Stream) {
	s.reset = true
	if !s.closed {
		c.close(s)
	}
	c.forget(s)
}

// streamError resets a stream for a violation of the peer's. That costs the
// peer what its own reset would (CVE-2025-8671).
func (c *Conn) streamError(id uint32, code http2.ErrCode) {
	if s := c.lookup(id); s != nil {
		if !c.charge() {
			return
		}
		c.abandon(s)
		c.events = append(c.events, Event{Kind: EventReset, Stream: s, Code: code, Local: true})
	}
	c.ctl = appendReset(c.ctl, id, code)
	c.reply(FrameHeaderLen + 4)
}

// abandon drops a stream that the peer may still be sending on.
func (c *Conn) abandon(s *Stream) {
	if !s.remoteClosed {
		c.late += int(max(s.recvWin, 0))
	}
	c.drop(s)
	s.Discard()
}

// Open opens a stream with a request. user becomes Stream.User.
func (c *Conn) Open(fields []hpack.HeaderField, user any) (*Stream, error) {
	switch {
	case !c.cfg.Client:
		return nil, ErrServer
	case c.err != nil || c.gonePeer || c.goneSent:
		return nil, ErrGoingAway
	case c.nextID > maxStreamID:
		return nil, ErrStreamIDs
	case uint32(c.opened) >= c.peerStreams:
		c.limited = true
		return nil, ErrStreamLimit
	case !c.fits(fields):
		return nil, ErrHeaderSize
	}
	s := c.newStream(c.nextID)
	s.User = user
	s.sentHeaders = true
	c.nextID += 2
	c.opened++
	c.appendHeaders(s.id, fields, false)
	return s, nil
}

// Respond answers a request. With end it ends our half too.
func (c *Conn) Respond(s *Stream, fields []hpack.HeaderField, end bool) error {
	switch {
	case s.closed || s.localClosed || c.err != nil:
		return ErrStreamClosed
	case !c.fits(fields):
		return ErrHeaderSize
	}
	s.sentHeaders = true
	c.appendHeaders(s.id, fields, end)
	if end {
		s.localClosed = true
		c.closeIfEnded(s)
	} else {
		c.earn(earnBytes)
	}
	return nil
}

// fits judges a header list by the peer's SETTINGS_MAX_HEADER_LIST_SIZE.
func (c *Conn) fits(fields []hpack.HeaderField) bool {
	n := uint64(0)
	for _, f := range fields {
		n += uint64(f.Size())
	}
	return n <= c.peerHeaderList
}

func (c *Conn) appendHeaders(id uint32, fields []hpack.HeaderField, end bool) {
	c.encoded.b = c.encoded.b[:0]
	for _, f := range fields {
		_ = c.enc.WriteField(f) // blockBuffer takes everything
	}
	t, flags := http2.FrameHeaders, http2.Flags(0)
	if end {
		flags = http2.FlagHeadersEndStream
	}
	for b := c.encoded.b; ; {
		n := min(len(b), defaultMaxFrame) // which every peer accepts
		if n == len(b) {
			flags |= http2.FlagHeadersEndHeaders // the same bit in CONTINUATION
		}
		c.ctl = appendFrameHeader(c.ctl, n, t, flags, id)
		c.ctl = append(c.ctl, b[:n]...)
		if b = b[n:]; len(b) == 0 {
			break
		}
		t, flags = http2.FrameContinuation, 0
	}
}

// PutData writes the 9 bytes of a DATA frame's header to hdr, for n bytes that
// the caller has laid behind it. n is at most what Sendable says and 16,384;
// the frame must be sent behind what Control held before.
func (c *Conn) PutData(hdr []byte, s *Stream, n int, end bool) {
	_ = hdr[FrameHeaderLen-1]
	hdr[0], hdr[1], hdr[2] = byte(n>>16), byte(n>>8), byte(n)
	hdr[3], hdr[4] = byte(http2.FrameData), 0
	hdr[5], hdr[6], hdr[7], hdr[8] = byte(s.id>>24), byte(s.id>>16), byte(s.id>>8), byte(s.id)
	s.sendWin -= int32(n)
	c.sendWin -= int64(n)
	c.updates += 2 * n
	if s.sendWin <= 0 || c.sendWin <= 0 {
		s.starved = true
	}
	if end {
		hdr[4] = byte(http2.FlagDataEndStream)
		s.localClosed = true
		c.closeIfEnded(s)
	}
}

// End ends our half of a stream.
func (c *Conn) End(s *Stream) {
	if s.localClosed || s.closed {
		return
	}
	c.ctl = appendFrameHeader(c.ctl, 0, http2.FrameData, http2.FlagDataEndStream, s.id)
	s.localClosed = true
	c.closeIfEnded(s)
}

// Reset closes a stream at once, both ways, and forgets what is queued. Of a
// stream that is closed already it only forgets that.
func (c *Conn) Reset(s *Stream, code http2.ErrCode) {
	if s.reset {
		s.Discard()
		return
	}
	if !s.closed {
		c.ctl = appendReset(c.ctl, s.id, code)
	}
	c.abandon(s)
}

// Taken tells that the application took n bytes of a stream, so that the peer
// may send as many again.
func (c *Conn) Taken(s *Stream, n int) {
	s.buffered = max(0, s.buffered-int32(n))
	if s.closed {
		if s.buffered == 0 && !s.reset {
			c.forget(s)
		}
		return
	}
	c.refill(s)
}

// SetWindow sets the receive window that a stream is to have, in bytes. A
// larger one is told to the peer, a smaller one reached by withholding
// updates: what was advertised cannot be taken back.
func (c *Conn) SetWindow(s *Stream, n int) {
	s.target = int32(min(max(n, 1), math.MaxInt32))
	c.refill(s)
}

// Ping queues a PING. EventPong brings its data back.
func (c *Conn) Ping(data [8]byte) {
	c.pings++
	c.ctl = appendFrameHeader(c.ctl, 8, http2.FramePing, 0, 0)
	c.ctl = append(c.ctl, data[:]...)
}

// GoAway tells the peer that no more streams are taken. Those that are open go
// on; what the peer opens from now on is refused, as the frame says it will be.
func (c *Conn) GoAway(code http2.ErrCode, debug string) {
	if c.err == nil {
		c.appendGoAway(code, debug)
	}
}

// AnnounceGoAway tells a client that a GOAWAY is to come, by one that refuses
// nothing yet: what it has opened by the time it reads that is served (RFC 9113,
// section 6.8). It reports false where there is nothing to announce: as a client, and
// after GoAway.
func (c *Conn) AnnounceGoAway() bool {
	if c.cfg.Client || c.err != nil || c.goneSent {
		return false
	}
	c.ctl = appendFrameHeader(c.ctl, 8, http2.FrameGoAway, 0, 0)
	c.ctl = binary.BigEndian.AppendUint32(c.ctl, maxStreamID)
	c.ctl = binary.BigEndian.AppendUint32(c.ctl, uint32(http2.ErrCodeNo))
	return true
}

// GoingAway reports whether either side sent a GOAWAY.
func (c *Conn) GoingAway() bool { return c.goneSent || c.gonePeer }

// CountStreams is how many streams are open, or closed with bytes of theirs not
// yet taken on the side that accepted them.
func (c *Conn) CountStreams() int { return c.opened + c.accepted }

// Stream finds an open stream, or returns nil.
func (c *Conn) Stream(id uint32) *Stream { return c.lookup(id) }
