// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"encoding/binary"

	"golang.org/x/net/http2"
)

func appendFrameHeader(b []byte, length int, t http2.FrameType, f http2.Flags, id uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), byte(t), byte(f),
		byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
}

func appendWindowUpdate(b []byte, id uint32, n int) []byte {
	b = appendFrameHeader(b, 4, http2.FrameWindowUpdate, 0, id)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func appendReset(b []byte, id uint32, code http2.ErrCode) []byte {
	b = appendFrameHeader(b, 4, http2.FrameRSTStream, 0, id)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func (c *Conn) appendGoAway(code http2.ErrCode, debug string) {
	debug = debug[:min(len(debug), maxDebug)]
	if !c.goneSent {
		c.goneSent = true
		c.goneLast = c.peerID
	}
	c.ctl = appendFrameHeader(c.ctl, 8+len(debug), http2.FrameGoAway, 0, 0)
	c.ctl = binary.BigEndian.AppendUint32(c.ctl, c.goneLast)
	c.ctl = binary.BigEndian.AppendUint32(c.ctl, uint32(code))
	c.ctl = append(c.ctl, debug...)
}

// Control is what is to be sent besides DATA, in order, ahead of DATA that is
// laid down later. It is valid until the next call of any method.
func (c *Conn) Control() []byte { return c.ctl[c.ctlOff:] }

// ConsumeControl takes n bytes from the front of Control.
func (c *Conn) ConsumeControl(n int) {
	c.ctlOff += n
	left := len(c.ctl) - c.ctlOff
	c.replies = min(c.replies, left)
	switch {
	case left > 0:
	case cap(c.ctl) > 4<<10: // an idle connection holds no buffer
		c.ctl, c.ctlOff = nil, 0
	default:
		c.ctl, c.ctlOff = c.ctl[:0], 0
	}
}
