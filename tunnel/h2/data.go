// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"encoding/binary"

	"golang.org/x/net/http2"
)

// beginData acts on the header of a DATA frame.
func (c *Conn) beginData() {
	f := &c.frame
	if f.id == 0 {
		c.fail(http2.ErrCodeProtocol, "DATA on stream 0")
		return
	}
	// Padding counts too, and so does what nobody wants: RFC 9113, 6.9.1.
	if f.length > c.recvWin {
		c.failf(http2.ErrCodeFlowControl, "DATA of %d bytes into a connection window of %d", f.length, c.recvWin)
		return
	}
	c.recvWin -= f.length
	if c.recvDue += f.length; c.recvDue >= ConnWindow/4 {
		c.ctl = appendWindowUpdate(c.ctl, 0, c.recvDue)
		c.recvWin += c.recvDue
		c.recvDue = 0
		c.reply(FrameHeaderLen + 4)
	}
	c.pad = 0
	s := c.lookup(f.id)
	if !c.mayHaveData(s) {
		c.cur = nil
		c.skip()
		return
	}
	s.recvWin -= int32(f.length)
	c.cur = s
	switch {
	case f.flags.Has(http2.FlagDataPadded):
		if f.length == 0 {
			c.fail(http2.ErrCodeFrameSize, "padded DATA of 0 bytes")
			return
		}
		c.mode = modePadLen
	case f.length == 0:
		if !f.flags.Has(http2.FlagDataEndStream) && !c.charge() {
			return
		}
		c.endData()
	default:
		c.mode = modeData
	}
}

// mayHaveData judges whether a DATA frame is s's. If not, the connection or the
// stream has been failed where that is due.
func (c *Conn) mayHaveData(s *Stream) bool {
	n := c.frame.length
	switch id := c.frame.id; {
	case s == nil && c.idle(id):
		c.failf(http2.ErrCodeProtocol, "DATA on idle stream %d", id)
	case s == nil && n > 0 && n <= c.late:
		// In flight when we reset the stream: RFC 9113, section 5.1.
		c.late -= n
	case s == nil:
		c.charge()
	case s.remoteClosed:
		c.streamError(id, http2.ErrCodeStreamClosed)
	case c.cfg.Client && !s.gotHeaders:
		c.streamError(id, http2.ErrCodeProtocol)
	case n > int(s.recvWin):
		c.streamError(id, http2.ErrCodeFlowControl)
	default:
		return true
	}
	return false
}

// padLength acts on the pad length of a DATA frame.
func (c *Conn) padLength(n int) {
	c.left--
	if n > c.left {
		c.failf(http2.ErrCodeProtocol, "DATA of %d bytes padded with %d", c.frame.length, n)
		return
	}
	c.pad = n
	c.left -= n
	switch {
	case c.left > 0:
		c.mode = modeData
	case c.frame.flags.Has(http2.FlagDataEndStream) || c.charge():
		c.endData()
	}
}

// data hands out a piece of a DATA frame.
func (c *Conn) data(p []byte) {
	s := c.cur
	if s == nil || s.closed { // reset by us in the middle of the frame
		return
	}
	s.buffered += int32(len(p))
	c.earn(len(p))
	c.events = append(c.events, Event{Kind: EventData, Stream: s, Data: p})
}

// endData is the end of a DATA frame's data, then of its padding, or of
// another frame's skipped payload.
func (c *Conn) endData() {
	if c.pad > 0 {
		c.left, c.pad = c.pad, 0
		c.mode = modeSkip
		return
	}
	c.mode = modeHeader
	s := c.cur
	c.cur = nil
	if s == nil || s.closed {
		return
	}
	switch {
	case c.frame.flags.Has(http2.FlagDataEndStream):
		c.remoteEnd(s)
	case c.frame.flags.Has(http2.FlagDataPadded):
		c.refill(s) // padding is taken at once
		c.reply(0)
	}
}

// remoteEnd is the end of the peer's half.
func (c *Conn) remoteEnd(s *Stream) {
	s.remoteClosed = true
	c.events = append(c.events, Event{Kind: EventEnd, Stream: s})
	c.closeIfEnded(s)
}

func (c *Conn) windowUpdate(p []byte) {
	id := c.frame.id
	if len(p) != 4 {
		c.failf(http2.ErrCodeFrameSize, "WINDOW_UPDATE of %d bytes", len(p))
		return
	}
	// Updates answer DATA: of the stream and of the connection, in the worst case
	// one for each byte that its application reads. More than that are no answer.
	if c.updates > 0 {
		c.updates--
	} else if !c.charge() {
		return
	}
	n := int64(binary.BigEndian.Uint32(p) & maxWindow)
	if id == 0 {
		switch {
		case n == 0:
			c.fail(http2.ErrCodeProtocol, "WINDOW_UPDATE of 0")
		case c.sendWin+n > maxWindow:
			c.fail(http2.ErrCodeFlowControl, "connection window above 2^31-1")
		default:
			was := c.sendWin
			if c.sendWin += n; was <= 0 && c.sendWin > 0 {
				c.wakeAll()
			}
		}
		return
	}
	s := c.lookup(id)
	switch {
	case s == nil && c.idle(id):
		c.failf(http2.ErrCodeProtocol, "WINDOW_UPDATE on idle stream %d", id)
	case s == nil:
		// It crossed our end or reset of the stream.
	case n == 0:
		c.streamError(id, http2.ErrCodeProtocol)
	case int64(s.sendWin)+n > maxWindow:
		c.streamError(id, http2.ErrCodeFlowControl)
	default:
		s.sendWin += int32(n)
		c.wake(s)
	}
}

// wake reports a stream that may send again.
func (c *Conn) wake(s *Stream) {
	if s.starved && c.sendWin > 0 && s.sendWin > 0 && !s.localClosed {
		s.starved = false
		c.events = append(c.events, Event{Kind: EventWritable, Stream: s})
	}
}

func (c *Conn) wakeAll() {
	for _, s := range c.streams {
		c.wake(s)
	}
}

// refill gives the peer back what was taken of a stream's window, once it is
// worth a frame: a quarter of the window.
func (c *Conn) refill(s *Stream) {
	if s.remoteClosed || s.closed {
		return
	}
	n := s.target - s.buffered - s.recvWin
	if n <= 0 || n < s.target/4 {
		return
	}
	s.recvWin += n
	c.ctl = appendWindowUpdate(c.ctl, s.id, int(n))
	// Not judged here, since the caller is the application; the next reply
	// that the peer causes is.
	c.replies += FrameHeaderLen + 4
}
