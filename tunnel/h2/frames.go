// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"encoding/binary"

	"golang.org/x/net/http2"
)

// whole takes a frame other than DATA whose payload is complete.
func (c *Conn) whole(p []byte) *ConnError {
	switch c.frame.typ {
	case typeHeaders:
		return c.onHeaders(p)
	case typeContinuation:
		return c.onContinuation(p)
	case typePriority:
		return c.onPriority(p)
	case typeReset:
		return c.onReset(p)
	case typeSettings:
		return c.onSettings(p)
	case typePush: // switched off, section 8.4
		return connError(http2.ErrCodeProtocol, "PUSH_PROMISE")
	case typePing:
		return c.onPing(p)
	case typeGoAway:
		return c.onGoAway(p)
	}
	return c.onWindowUpdate(p)
}

// known returns an error when a stream without a state was never opened. What
// comes for closed ones may have crossed our reset on the way, section 5.1, and
// is thrown away; which of them we reset is not remembered.
func (c *Conn) known(id uint32, what string) *ConnError {
	if c.cfg.Client {
		if id%2 == 1 && id < c.nextID {
			return nil
		}
	} else if id%2 == 1 && id <= c.lastPeer || c.goAwaySent && id%2 == 1 {
		return nil
	}
	return connError(http2.ErrCodeProtocol, "%s on stream %d, which is idle", what, id)
}

// streamError ends a stream for the peer's fault, section 5.4.2.
func (c *Conn) streamError(s *Stream, code http2.ErrCode, detail string) {
	c.nuisance--
	c.replies++
	c.queueReset(s.id, code)
	c.drop(s)
	c.emit(Event{Kind: EventReset, Stream: s, Code: code, Local: true, Detail: detail})
}

func (c *Conn) onPriority(p []byte) *ConnError {
	c.nuisance--
	switch {
	case c.frame.id == 0:
		return connError(http2.ErrCodeProtocol, "PRIORITY on stream 0")
	case len(p) == 5:
	case c.streams[c.frame.id] != nil:
		c.streamError(c.streams[c.frame.id], http2.ErrCodeFrameSize, "PRIORITY of a wrong size")
	default:
		return connError(http2.ErrCodeFrameSize, "PRIORITY of %d bytes", len(p))
	}
	return nil
}

func (c *Conn) onReset(p []byte) *ConnError {
	switch {
	case c.frame.id == 0:
		return connError(http2.ErrCodeProtocol, "RST_STREAM on stream 0")
	case len(p) != 4:
		return connError(http2.ErrCodeFrameSize, "RST_STREAM of %d bytes", len(p))
	}
	s := c.streams[c.frame.id]
	if s == nil {
		c.nuisance--
		return c.known(c.frame.id, "RST_STREAM")
	}
	if !s.answered {
		// Opening and taking back makes work that no limit of concurrent
		// streams bounds (CVE-2023-44487).
		c.nuisance--
	}
	c.drop(s)
	c.emit(Event{Kind: EventReset, Stream: s, Code: http2.ErrCode(binary.BigEndian.Uint32(p))})
	return nil
}

func (c *Conn) onSettings(p []byte) *ConnError {
	if c.frame.id != 0 {
		return connError(http2.ErrCodeProtocol, "SETTINGS on stream %d", c.frame.id)
	}
	if c.frame.flags&flagAck != 0 {
		if len(p) != 0 {
			return connError(http2.ErrCodeFrameSize, "acknowledgement of SETTINGS with a payload")
		}
		c.onSettingsAck()
		return nil
	}
	if len(p)%6 != 0 {
		return connError(http2.ErrCodeFrameSize, "SETTINGS of %d bytes", len(p))
	}
	first := !c.settingsGot
	c.settingsGot = true
	if first {
		c.peerStreams = maxStreamID // no limit unless it says so
	} else {
		c.nuisance--
	}
	for ; len(p) > 0; p = p[6:] {
		id, v := http2.SettingID(binary.BigEndian.Uint16(p)), binary.BigEndian.Uint32(p[2:])
		switch id {
		case http2.SettingEnablePush:
			if v > 1 || v == 1 && c.cfg.Client {
				return connError(http2.ErrCodeProtocol, "ENABLE_PUSH is %d", v)
			}
		case http2.SettingMaxConcurrentStreams:
			c.peerStreams = v
		case http2.SettingInitialWindowSize:
			if v > maxWindow {
				return connError(http2.ErrCodeFlowControl, "INITIAL_WINDOW_SIZE is %d", v)
			}
			if err := c.setInitialSend(int64(v)); err != nil {
				return err
			}
		case http2.SettingMaxFrameSize:
			// Ours never exceed the smallest value allowed.
			if v < minMaxFrame || v > maxMaxFrame {
				return connError(http2.ErrCodeProtocol, "MAX_FRAME_SIZE is %d", v)
			}
		}
		// HEADER_TABLE_SIZE: we use no table. MAX_HEADER_LIST_SIZE is advice
		// and ours are small.
	}
	c.replies++
	c.ctl = appendHeader(c.ctl, 0, typeSettings, flagAck, 0)
	if first {
		c.emit(Event{Kind: EventSettings})
	}
	return nil
}

// setInitialSend moves every stream's send window by the difference, section
// 6.9.2.
func (c *Conn) setInitialSend(v int64) *ConnError {
	d := v - c.initialSend
	c.initialSend = v
	if d == 0 {
		return nil
	}
	for s := c.first; s != nil; s = s.next {
		if s.localClosed {
			continue
		}
		if s.sendWindow+d > maxWindow {
			return connError(http2.ErrCodeFlowControl, "INITIAL_WINDOW_SIZE makes the window of stream %d too large", s.id)
		}
		c.addSend(s, d)
	}
	return nil
}

// addSend changes a stream's send window, and says so when it may send again.
func (c *Conn) addSend(s *Stream, d int64) {
	before := s.sendWindow
	s.sendWindow += d
	if before <= 0 && s.Sendable() > 0 {
		c.emit(Event{Kind: EventWritable, Stream: s})
	}
}

func (c *Conn) onSettingsAck() {
	if c.settingsAcked {
		c.nuisance--
		return
	}
	// From here on the peer's header blocks use no table, and its streams
	// have the window that we said.
	c.settingsAcked = true
	c.dec = nil
	if d := int64(c.cfg.InitialWindow) - defaultWindow; d < 0 {
		for s := c.first; s != nil; s = s.next {
			s.recvWindow += d
		}
	}
}

func (c *Conn) onPing(p []byte) *ConnError {
	switch {
	case c.frame.id != 0:
		return connError(http2.ErrCodeProtocol, "PING on stream %d", c.frame.id)
	case len(p) != 8:
		return connError(http2.ErrCodeFrameSize, "PING of %d bytes", len(p))
	case c.frame.flags&flagAck != 0:
		c.emit(Event{Kind: EventPong, Data: append([]byte(nil), p...)})
	default:
		c.replies++
		c.queuePing(flagAck, p)
	}
	return nil
}

func (c *Conn) onGoAway(p []byte) *ConnError {
	switch {
	case c.frame.id != 0:
		return connError(http2.ErrCodeProtocol, "GOAWAY on stream %d", c.frame.id)
	case len(p) < 8:
		return connError(http2.ErrCodeFrameSize, "GOAWAY of %d bytes", len(p))
	}
	if c.goAwayGot {
		c.nuisance--
	}
	c.goAwayGot = true
	last := binary.BigEndian.Uint32(p) & maxStreamID
	code := http2.ErrCode(binary.BigEndian.Uint32(p[4:]))
	c.emit(Event{Kind: EventGoAway, Code: code, LastStream: last, Data: append([]byte(nil), p[8:]...)})
	if !c.cfg.Client {
		return nil
	}
	for s := c.first; s != nil; {
		next := s.next
		if s.id > last && !s.Closed() {
			// Not looked at, so it may be tried elsewhere, section 8.7.
			c.drop(s)
			c.emit(Event{Kind: EventReset, Stream: s, Code: http2.ErrCodeRefusedStream})
		}
		s = next
	}
	return nil
}

func (c *Conn) onWindowUpdate(p []byte) *ConnError {
	if len(p) != 4 {
		return connError(http2.ErrCodeFrameSize, "WINDOW_UPDATE of %d bytes", len(p))
	}
	n := int64(binary.BigEndian.Uint32(p) & maxWindow)
	if c.frame.id == 0 {
		switch {
		case n == 0:
			return connError(http2.ErrCodeProtocol, "WINDOW_UPDATE of 0")
		case c.sendWindow+n > maxWindow:
			return connError(http2.ErrCodeFlowControl, "WINDOW_UPDATE makes the connection's window too large")
		}
		before := c.sendWindow
		c.sendWindow += n
		if before <= 0 && c.sendWindow > 0 {
			for s := c.first; s != nil; s = s.next {
				if s.Sendable() > 0 {
					c.emit(Event{Kind: EventWritable, Stream: s})
				}
			}
		}
		return nil
	}
	s := c.streams[c.frame.id]
	switch {
	case s == nil:
		return c.known(c.frame.id, "WINDOW_UPDATE")
	case n == 0:
		c.streamError(s, http2.ErrCodeProtocol, "WINDOW_UPDATE of 0")
	case s.sendWindow+n > maxWindow:
		c.streamError(s, http2.ErrCodeFlowControl, "WINDOW_UPDATE makes the stream's window too large")
	default:
		c.addSend(s, n)
	}
	return nil
}
