// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"encoding/binary"

	"golang.org/x/net/http2"
)

func (c *Conn) settings(p []byte) {
	switch {
	case c.frame.id != 0:
		c.fail(http2.ErrCodeProtocol, "SETTINGS on a stream")
		return
	case c.frame.flags.Has(http2.FlagSettingsAck):
		c.settingsAck(p)
		return
	case len(p)%6 != 0:
		c.failf(http2.ErrCodeFrameSize, "SETTINGS of %d bytes", len(p))
		return
	}
	first := !c.settled
	if first {
		c.settled = true
		c.peerStreams = 1<<32 - 1 // where they do not say
	} else if !c.charge() {
		return
	}
	for ; len(p) > 0; p = p[6:] {
		c.setting(http2.SettingID(binary.BigEndian.Uint16(p)), binary.BigEndian.Uint32(p[2:]))
		if c.err != nil {
			return
		}
	}
	c.ctl = appendFrameHeader(c.ctl, 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	c.reply(FrameHeaderLen)
	if first {
		c.events = append(c.events, Event{Kind: EventSettings})
	}
}

func (c *Conn) setting(id http2.SettingID, v uint32) {
	switch id {
	case http2.SettingHeaderTableSize:
		if v < c.peerTable {
			c.enc.SetMaxDynamicTableSize(0) // the next block says so: RFC 9113, 4.3.1
		}
		c.peerTable = v
	case http2.SettingEnablePush:
		// We never push. A server must not say that it would accept any.
		if v > 1 || v == 1 && c.cfg.Client {
			c.failf(http2.ErrCodeProtocol, "ENABLE_PUSH is %d", v)
		}
	case http2.SettingMaxConcurrentStreams:
		c.peerStreams = v
	case http2.SettingInitialWindowSize:
		c.initialWindow(v)
	case http2.SettingMaxFrameSize:
		if v < defaultMaxFrame || v > 1<<24-1 {
			c.failf(http2.ErrCodeProtocol, "MAX_FRAME_SIZE is %d", v)
		}
		// Nothing that we send is larger than any peer accepts.
	case http2.SettingMaxHeaderListSize:
		c.peerHeaderList = uint64(v)
	}
}

// initialWindow moves every stream's window: RFC 9113, section 6.9.2.
func (c *Conn) initialWindow(v uint32) {
	if v > maxWindow {
		c.failf(http2.ErrCodeFlowControl, "INITIAL_WINDOW_SIZE is %d", v)
		return
	}
	d := int(v) - c.peerWindow
	c.peerWindow = int(v)
	if d == 0 {
		return
	}
	for _, s := range c.streams {
		if s.closed {
			continue
		}
		n := int(s.sendWin) + d
		if n > maxWindow {
			c.failf(http2.ErrCodeFlowControl, "window of stream %d above 2^31-1", s.id)
			return
		}
		s.sendWin = int32(n) // may be negative, never below -(2^31-1)
		c.wake(s)
	}
}

func (c *Conn) settingsAck(p []byte) {
	switch {
	case len(p) != 0:
		c.failf(http2.ErrCodeFrameSize, "SETTINGS acknowledgement of %d bytes", len(p))
	case c.acked: // we send SETTINGS once
		c.charge()
	default:
		c.acked = true
		c.dec.SetAllowedMaxDynamicTableSize(0)
		c.wantUpdate = c.tableSize > 0
	}
}
