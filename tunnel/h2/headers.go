// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

func (c *Conn) onHeaders(p []byte) *ConnError {
	f := c.frame
	if f.id == 0 {
		return connError(http2.ErrCodeProtocol, "HEADERS on stream 0")
	}
	pad := 0
	if f.flags&flagPadded != 0 {
		if len(p) < 1 {
			return connError(http2.ErrCodeFrameSize, "padded HEADERS without a length of the padding")
		}
		pad, p = int(p[0]), p[1:]
	}
	if f.flags&flagPriority != 0 {
		if len(p) < 5 {
			return connError(http2.ErrCodeFrameSize, "HEADERS too short for its priority")
		}
		p = p[5:]
	}
	if pad > len(p) {
		return connError(http2.ErrCodeProtocol, "HEADERS with more padding than payload")
	}
	p = p[:len(p)-pad]
	c.blockID, c.blockFlags, c.blockCount = f.id, f.flags, 0
	if f.flags&flagEndHeaders != 0 {
		return c.onBlock(p)
	}
	c.inBlock = true
	return c.addBlock(p)
}

func (c *Conn) onContinuation(p []byte) *ConnError {
	if !c.inBlock {
		return connError(http2.ErrCodeProtocol, "CONTINUATION without HEADERS")
	}
	if c.blockCount++; c.blockCount > maxContinuations {
		return connError(http2.ErrCodeEnhanceYourCalm, "header block of more than %d frames", maxContinuations)
	}
	if err := c.addBlock(p); err != nil {
		return err
	}
	if c.frame.flags&flagEndHeaders == 0 {
		return nil
	}
	p = c.block
	c.block, c.inBlock = nil, false
	return c.onBlock(p)
}

func (c *Conn) addBlock(p []byte) *ConnError {
	if len(c.block)+len(p) > c.cfg.MaxHeaderBytes {
		return connError(http2.ErrCodeEnhanceYourCalm, "header block of more than %d bytes", c.cfg.MaxHeaderBytes)
	}
	c.block = append(c.block, p...)
	return nil
}

// onBlock takes a whole header block. It is decoded whatever becomes of it,
// because the decoder's table depends on it.
func (c *Conn) onBlock(p []byte) *ConnError {
	fields, whole, err := c.decode(p)
	if err != nil {
		return err
	}
	id, end := c.blockID, c.blockFlags&flagEndStream != 0
	s := c.streams[id]
	if s == nil {
		if c.cfg.Client || id%2 == 0 || id <= c.lastPeer {
			c.nuisance--
			return c.known(id, "HEADERS")
		}
		if c.goAwaySent {
			return nil // it knows that nobody looks at it
		}
		c.lastPeer = id
		if uint32(len(c.streams)) >= c.cfg.MaxConcurrentStreams {
			c.nuisance--
			c.replies++
			c.queueReset(id, http2.ErrCodeRefusedStream)
			return nil
		}
		s = c.newStream(id)
	}
	switch {
	case s.remoteClosed:
		c.streamError(s, http2.ErrCodeStreamClosed, "HEADERS after END_STREAM")
		return nil
	case !whole:
		c.fault(s, http2.ErrCodeEnhanceYourCalm, "header list is too large")
		return nil
	case s.headersGot:
		c.onTrailers(s, fields, end)
		return nil
	}
	status, fault := wellFormed(fields, c.cfg.Client)
	if fault != "" {
		c.fault(s, http2.ErrCodeProtocol, fault)
		return nil
	}
	if c.cfg.Client {
		if status[0] == '1' { // informational: another follows
			c.nuisance--
			if end {
				c.streamError(s, http2.ErrCodeProtocol, "informational answer with END_STREAM")
			}
			return nil
		}
		s.tunnel = status[0] == '2'
	}
	s.headersGot = true
	c.emit(Event{Kind: EventHeaders, Stream: s, Headers: fields})
	if end {
		c.end(s)
	}
	return nil
}

// fault ends a stream. One that nobody has been told of ends quietly.
func (c *Conn) fault(s *Stream, code http2.ErrCode, detail string) {
	if c.cfg.Client || s.headersGot {
		c.streamError(s, code, detail)
		return
	}
	c.nuisance--
	c.replies++
	c.queueReset(s.id, code)
	c.drop(s)
}

// onTrailers takes further header blocks. A tunnel has none, section 8.5; a
// refusal may have.
func (c *Conn) onTrailers(s *Stream, fields []hpack.HeaderField, end bool) {
	switch {
	case !c.cfg.Client, s.tunnel:
		c.streamError(s, http2.ErrCodeProtocol, "HEADERS within a tunnel")
	case !end:
		c.streamError(s, http2.ErrCodeProtocol, "trailers without END_STREAM")
	default:
		for _, f := range fields {
			if f.IsPseudo() || !validField(f) {
				c.streamError(s, http2.ErrCodeProtocol, "malformed trailers")
				return
			}
		}
		c.end(s)
	}
}

// decode decodes a header block. whole is false when the list is larger than
// it may be; then fields is not complete.
func (c *Conn) decode(p []byte) (fields []hpack.HeaderField, whole bool, cerr *ConnError) {
	d := c.decoder()
	at, size := len(c.scratch.fields), 0
	d.SetEmitFunc(func(f hpack.HeaderField) {
		if size += int(f.Size()); size <= c.cfg.MaxHeaderBytes {
			c.scratch.fields = append(c.scratch.fields, f)
		}
	})
	_, err := d.Write(p)
	if err == nil {
		err = d.Close()
	}
	d.SetEmitFunc(nil) // it holds c, and the decoder may be shared
	if err != nil {
		c.scratch.dec = nil
		return nil, false, connError(http2.ErrCodeCompression, "%v", err)
	}
	n := len(c.scratch.fields)
	return c.scratch.fields[at:n:n], size <= c.cfg.MaxHeaderBytes, nil
}

// decoder is the connection's own while the peer may use a dynamic table, then
// one without state that is shared.
func (c *Conn) decoder() *hpack.Decoder {
	d := &c.dec
	size := uint32(defaultTableSize)
	if c.settingsAcked {
		d, size = &c.scratch.dec, 0
	}
	if *d == nil {
		*d = hpack.NewDecoder(size, nil)
	}
	(*d).SetMaxStringLength(c.cfg.MaxHeaderBytes)
	return *d
}

// wellFormed says what is wrong with a request or an answer (RFC 9113, sections
// 8.2 and 8.3), and returns an answer's status. What its fields mean is not
// looked at.
func wellFormed(fields []hpack.HeaderField, client bool) (status, fault string) {
	var seen uint8
	regular := false
	for _, f := range fields {
		if !validField(f) {
			return "", "malformed field " + quote(f.Name)
		}
		if !f.IsPseudo() {
			regular = true
			switch f.Name {
			case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
				return "", "field " + f.Name + " has no meaning in HTTP/2"
			case "te":
				if f.Value != "trailers" {
					return "", "field te is not trailers"
				}
			}
			continue
		}
		if regular {
			return "", "pseudo-header field behind others"
		}
		var bit uint8
		switch {
		case client && f.Name == ":status":
			bit, status = 1, f.Value
		case client:
		case f.Name == ":method":
			bit = 1
		case f.Name == ":scheme":
			bit = 2
		case f.Name == ":authority":
			bit = 4
		case f.Name == ":path":
			bit = 8
		case f.Name == ":protocol":
			bit = 16
		}
		if bit == 0 {
			return "", "unknown pseudo-header field " + quote(f.Name)
		}
		if seen&bit != 0 {
			return "", "pseudo-header field twice: " + f.Name
		}
		seen |= bit
	}
	if client && !validStatus(status) {
		return "", "no valid status"
	}
	if !client && seen&1 == 0 {
		return "", "no method"
	}
	return status, ""
}

func validStatus(s string) bool {
	if len(s) != 3 || s[0] < '1' || s[0] > '9' {
		return false
	}
	return s[1] >= '0' && s[1] <= '9' && s[2] >= '0' && s[2] <= '9'
}

func validField(f hpack.HeaderField) bool {
	name := f.Name
	if f.IsPseudo() {
		name = name[1:]
	}
	if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(f.Value) {
		return false
	}
	for i := 0; i < len(name); i++ {
		if name[i] >= 'A' && name[i] <= 'Z' {
			return false
		}
	}
	v := f.Value
	return v == "" || !space(v[0]) && !space(v[len(v)-1])
}

func space(b byte) bool { return b == ' ' || b == '\t' }

// quote shortens a peer's string for a message.
func quote(s string) string {
	const most = 64 // bytes
	if len(s) > most {
		s = s[:most]
	}
	b := []byte(s)
	for i, x := range b {
		if x < ' ' || x > '~' {
			b[i] = '?'
		}
	}
	return `"` + string(b) + `"`
}

// queueHeaders queues a header block. It is literals without indexing: there
// is no dynamic table, so nothing of it needs to be kept, and nothing of one
// stream shows in the compression of another.
func (c *Conn) queueHeaders(id uint32, fields []hpack.HeaderField, end bool) {
	at := len(c.ctl)
	c.ctl = appendHeader(c.ctl, 0, typeHeaders, 0, id)
	if !c.tableUpdated {
		// Whatever size the peer allows, ours is 0 (RFC 7541, section 4.2).
		c.tableUpdated = true
		c.ctl = append(c.ctl, 0x20)
	}
	for _, f := range fields {
		c.ctl = appendField(c.ctl, f)
	}
	flags := uint8(0)
	if end {
		flags = flagEndStream
	}
	n := len(c.ctl) - at - frameHeaderLen
	if n <= minMaxFrame {
		appendHeader(c.ctl[:at], n, typeHeaders, flags|flagEndHeaders, id)
		return
	}
	block := append([]byte(nil), c.ctl[at+frameHeaderLen:]...)
	c.ctl = c.ctl[:at]
	for typ := uint8(typeHeaders); len(block) > 0; typ, flags = typeContinuation, 0 {
		k := min(len(block), minMaxFrame)
		if k == len(block) {
			flags |= flagEndHeaders
		}
		c.ctl = appendHeader(c.ctl, k, typ, flags, id)
		c.ctl = append(c.ctl, block[:k]...)
		block = block[k:]
	}
}

// appendField appends a literal (RFC 7541, section 6.2.2, or 6.2.3 for what
// must not be indexed further on).
func appendField(b []byte, f hpack.HeaderField) []byte {
	// Indexes of the static table, RFC 7541, appendix A.
	index := byte(0)
	switch f.Name {
	case ":authority":
		index = 1
	case ":method":
		index = 2
	case ":status":
		if f.Value == "200" {
			return append(b, 0x80|8)
		}
		index = 8
	}
	if f.Sensitive {
		b = append(b, 0x10|index)
	} else {
		b = append(b, index)
	}
	if index == 0 {
		b = appendString(b, f.Name)
	}
	return appendString(b, f.Value)
}

// appendString appends a string, coded by Huffman where that is shorter.
func appendString(b []byte, s string) []byte {
	n := hpack.HuffmanEncodeLength(s)
	if n >= uint64(len(s)) {
		return append(appendLength(b, 0, len(s)), s...)
	}
	return hpack.AppendHuffmanString(appendLength(b, 0x80, int(n)), s)
}

// appendLength appends an integer with a prefix of 7 bits (RFC 7541, section
// 5.1).
func appendLength(b []byte, first byte, n int) []byte {
	if n < 0x7f {
		return append(b, first|byte(n))
	}
	b = append(b, first|0x7f)
	for n -= 0x7f; n >= 0x80; n >>= 7 {
		b = append(b, 0x80|byte(n))
	}
	return append(b, byte(n))
}
