// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"encoding/binary"
	"io"
	"net"
	"sync"

	"github.com/culvert-mesh/culvert/tunnel/record"
)

// readLen is how many bytes are asked of the socket at once: most flights of a
// handshake are shorter.
const readLen = 4096

// An alert as it is before there are keys, RFC 8446 section 6.
const (
	typeAlert = 21
	alertLen  = 2 // bytes: level, description
)

// conn never lets crypto/tls read past the record that it asks for, so that
// what follows the handshake's last record stays here.
type conn struct {
	net.Conn
	turn sync.Locker // given up while a read waits; nil: none
	mute bool        // writes are dropped

	buf   []byte // unread: buf[r:w]
	r, w  int
	left  int // bytes of the current record that crypto/tls has not taken
	total int // bytes of all records so far, headers included
	over  bool

	typ   byte  // of the current record
	size  int   // of it, without its header
	alert uint8 // the last unprotected alert; 0, close_notify, is as good as none
}

// Read gives bytes of one record only.
func (c *conn) Read(p []byte) (int, error) {
	if c.left == 0 {
		if err := c.header(); err != nil {
			return 0, err
		}
	}
	if c.r == c.w {
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.buf[c.r:min(c.w, c.r+c.left)])
	c.r += n
	c.left -= n
	if c.left == 0 && c.typ == typeAlert && c.size == alertLen {
		c.alert = p[n-1]
	}
	return n, nil
}

// header reads up to the end of the next record's header and looks at it.
func (c *conn) header() error {
	for c.w-c.r < record.HeaderLen {
		if err := c.fill(); err != nil {
			if err == io.EOF && c.w > c.r {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	h := c.buf[c.r : c.r+record.HeaderLen]
	c.typ, c.size = h[0], int(binary.BigEndian.Uint16(h[3:]))
	c.left = record.HeaderLen + c.size
	c.total += c.left
	if c.total > maxBytes {
		// A length that crypto/tls refuses, with an alert of its own.
		c.over = true
		binary.BigEndian.PutUint16(h[3:], 0xffff)
		c.left = record.HeaderLen
	}
	return nil
}

// fill reads once.
func (c *conn) fill() error {
	if c.buf == nil {
		c.buf = make([]byte, readLen)
	}
	if c.r == c.w {
		c.r, c.w = 0, 0
	} else if c.w == len(c.buf) { // only for a header: less than 5 bytes
		c.w = copy(c.buf, c.buf[c.r:c.w])
		c.r = 0
	}
	if c.turn != nil {
		c.turn.Unlock()
	}
	n, err := c.Conn.Read(c.buf[c.w:])
	if c.turn != nil {
		c.turn.Lock()
	}
	c.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		return io.ErrNoProgress
	}
	return err
}

// Write drops what crypto/tls writes once it shall say no more.
func (c *conn) Write(p []byte) (int, error) {
	if c.mute {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

// Close does nothing: the caller of the handshake owns the connection.
func (c *conn) Close() error { return nil }

// atBoundary reports whether crypto/tls has taken whole records.
func (c *conn) atBoundary() bool { return c.left == 0 }

// leftover is what was read and not taken, in memory of its own.
func (c *conn) leftover() []byte {
	if c.r == c.w {
		return nil
	}
	return append([]byte(nil), c.buf[c.r:c.w]...)
}
