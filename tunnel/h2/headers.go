// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// blockBuffer takes what the HPACK encoder writes.
type blockBuffer struct{ b []byte }

func (w *blockBuffer) Write(p []byte) (int, error) {
	w.b = append(w.b, p...)
	return len(p), nil
}

func (c *Conn) newCodec() {
	c.enc = hpack.NewEncoder(&c.encoded)
	// No dynamic table, which the first block says: a use of our table would
	// have to outlive a take-over, and saves nothing on a few short fields.
	c.enc.SetMaxDynamicTableSizeLimit(0)
	c.dec = hpack.NewDecoder(defaultTableSize, c.field)
	c.dec.SetMaxStringLength(c.cfg.MaxHeaderBytes)
}

// field takes a decoded field.
func (c *Conn) field(f hpack.HeaderField) {
	c.listFields++
	if c.listSize += int(f.Size()); c.listSize > c.cfg.MaxHeaderBytes || c.listFields > maxFields {
		return // the table must still be kept
	}
	if c.fields == nil {
		c.fields = make([]hpack.HeaderField, 0, 8)
	}
	c.fields = append(c.fields, f)
}

func (c *Conn) headers(p []byte) {
	f := &c.frame
	switch {
	case f.id == 0:
		c.fail(http2.ErrCodeProtocol, "HEADERS on stream 0")
		return
	case f.id%2 == 0, c.cfg.Client && c.idle(f.id):
		c.failf(http2.ErrCodeProtocol, "HEADERS on stream %d, which is not the peer's to open", f.id)
		return
	}
	pad := 0
	if f.flags.Has(http2.FlagHeadersPadded) {
		if len(p) < 1 {
			c.fail(http2.ErrCodeFrameSize, "padded HEADERS of 0 bytes")
			return
		}
		pad = int(p[0])
		p = p[1:]
	}
	if f.flags.Has(http2.FlagHeadersPriority) {
		if len(p) < 5 {
			c.failf(http2.ErrCodeFrameSize, "HEADERS of %d bytes with priority", f.length)
			return
		}
		p = p[5:] // RFC 9113, section 5.3: deprecated, ignored
	}
	if pad > len(p) {
		c.failf(http2.ErrCodeProtocol, "HEADERS of %d bytes padded with %d", f.length, pad)
		return
	}
	p = p[:len(p)-pad]
	end := f.flags.Has(http2.FlagHeadersEndStream)
	if f.flags.Has(http2.FlagHeadersEndHeaders) {
		c.headerBlock(f.id, end, p)
		return
	}
	if len(p) > c.cfg.MaxHeaderBytes {
		c.failf(http2.ErrCodeEnhanceYourCalm, "header block of more than %d bytes", c.cfg.MaxHeaderBytes)
		return
	}
	c.blockID, c.blockEnd, c.blockFrames = f.id, end, 0
	c.block = append(c.block[:0], p...)
}

func (c *Conn) continuation(p []byte) {
	if c.blockID == 0 {
		c.failf(http2.ErrCodeProtocol, "CONTINUATION on stream %d without HEADERS", c.frame.id)
		return
	}
	if c.blockFrames++; c.blockFrames > maxContinuations {
		c.failf(http2.ErrCodeEnhanceYourCalm, "header block of more than %d CONTINUATION frames", maxContinuations)
		return
	}
	if len(c.block)+len(p) > c.cfg.MaxHeaderBytes {
		c.failf(http2.ErrCodeEnhanceYourCalm, "header block of more than %d bytes", c.cfg.MaxHeaderBytes)
		return
	}
	c.block = append(c.block, p...)
	if c.frame.flags.Has(http2.FlagContinuationEndHeaders) {
		id, end, block := c.blockID, c.blockEnd, c.block
		c.blockID, c.block = 0, nil
		c.headerBlock(id, end, block)
	}
}

// A list that is too large costs its stream, for the table has to be kept. One
// that is bomb times as large as may be ends the session: a byte of a block can
// be a field of 4 KiB, and taking it all apart costs the loop's other sessions
// their time. It is looked at each decodeStep bytes, a thousand fields at most.
const (
	bomb       = 4
	decodeStep = 1 << 10
)

// decode decodes a whole block. ok is false when the list is too large; a
// block that cannot be decoded fails the connection.
func (c *Conn) decode(block []byte) (fields []hpack.HeaderField, ok bool) {
	if len(block) > c.cfg.MaxHeaderBytes {
		c.failf(http2.ErrCodeEnhanceYourCalm, "header block of more than %d bytes", c.cfg.MaxHeaderBytes)
		return nil, false
	}
	if !c.tableUpdates(block) {
		c.fail(http2.ErrCodeCompression, "no dynamic table size update after SETTINGS")
		return nil, false
	}
	c.fields, c.listSize, c.listFields = nil, 0, 0
	c.dec.SetEmitEnabled(true)
	var err error
	for step := decodeStep; len(block) > 0 && err == nil; block = block[step:] {
		step = min(step, len(block))
		_, err = c.dec.Write(block[:step])
		if c.listSize > bomb*c.cfg.MaxHeaderBytes || c.listFields > bomb*maxFields {
			c.failf(http2.ErrCodeEnhanceYourCalm, "header list of more than %d fields or %d bytes", bomb*maxFields, bomb*c.cfg.MaxHeaderBytes)
			return nil, false
		}
	}
	if err == nil {
		err = c.dec.Close()
	}
	if err != nil {
		c.fail(http2.ErrCodeCompression, err.Error())
		return nil, false
	}
	fields = c.fields
	c.fields = nil
	return fields, c.listSize <= c.cfg.MaxHeaderBytes && c.listFields <= maxFields
}

// tableUpdates follows the dynamic table size updates at the front of a block
// (RFC 7541, section 6.3), and reports whether one is missing where RFC 9113,
// section 4.3.1 demands it. The decoder judges whether they are well-formed.
func (c *Conn) tableUpdates(b []byte) bool {
	for len(b) > 0 && b[0]&0xe0 == 0x20 {
		n := uint64(b[0] & 0x1f)
		b = b[1:]
		if n == 0x1f {
			for shift := 0; len(b) > 0 && shift < 32; shift += 7 {
				d := b[0]
				b = b[1:]
				n += uint64(d&0x7f) << shift
				if d < 0x80 {
					break
				}
			}
		}
		c.tableSize = uint32(min(n, defaultTableSize))
		c.wantUpdate = c.wantUpdate && c.tableSize > 0
	}
	return !c.wantUpdate
}

// headerBlock acts on a whole header block.
func (c *Conn) headerBlock(id uint32, end bool, block []byte) {
	fields, ok := c.decode(block)
	if c.err != nil {
		return
	}
	s := c.lookup(id)
	switch {
	case s == nil && c.cfg.Client, s == nil && id <= c.peerID:
		c.charge() // for a stream that is gone
	case s == nil:
		c.request(id, end, fields, ok)
	case s.remoteClosed:
		c.streamError(id, http2.ErrCodeStreamClosed)
	case !c.cfg.Client:
		// RFC 9113, section 8.5: only DATA on a CONNECT stream.
		c.streamError(id, http2.ErrCodeProtocol)
	default:
		c.response(s, end, fields, ok)
	}
}

// request acts on the header block that opens a stream.
func (c *Conn) request(id uint32, end bool, fields []hpack.HeaderField, ok bool) {
	c.peerID = id
	refuse := http2.ErrCodeNo
	switch {
	case len(c.Control()) > maxControl:
		c.fail(http2.ErrCodeEnhanceYourCalm, "answers are not read")
		return
	case c.goneSent:
		// Our GOAWAY told, or tells, that it is not processed. Said once more, a
		// peer that has not read that yet can go elsewhere at once.
		refuse = http2.ErrCodeRefusedStream
	case uint32(c.accepted) >= c.cfg.MaxConcurrentStreams:
		refuse = http2.ErrCodeRefusedStream
	case !ok:
		refuse = http2.ErrCodeEnhanceYourCalm
	case !wellFormed(fields, requestBlock):
		refuse = http2.ErrCodeProtocol
	}
	if refuse != http2.ErrCodeNo {
		c.late += int(c.cfg.InitialWindow)
		if c.charge() {
			c.streamError(id, refuse)
		}
		return
	}
	s := c.newStream(id)
	s.gotHeaders = true
	c.accepted++
	c.events = append(c.events, Event{Kind: EventHeaders, Stream: s, Headers: fields})
	if end {
		c.remoteEnd(s)
	}
}

// response acts on a header block of a server.
func (c *Conn) response(s *Stream, end bool, fields []hpack.HeaderField, ok bool) {
	kind := responseBlock
	if s.gotHeaders {
		kind = trailerBlock
	}
	switch {
	case !ok:
		c.streamError(s.id, http2.ErrCodeEnhanceYourCalm)
		return
	case !wellFormed(fields, kind), kind == trailerBlock && (s.connected || !end):
		c.streamError(s.id, http2.ErrCodeProtocol)
		return
	case kind == trailerBlock:
		// Behind a refusal: of no use.
		c.remoteEnd(s)
		return
	}
	switch status := fields[0].Value; status[0] {
	case '1': // informational
		if end || status == "101" {
			c.streamError(s.id, http2.ErrCodeProtocol)
			return
		}
		c.charge()
		return
	case '2':
		s.connected = true
	}
	s.gotHeaders = true
	c.earn(earnBytes)
	c.events = append(c.events, Event{Kind: EventHeaders, Stream: s, Headers: fields})
	if end {
		c.remoteEnd(s)
	}
}

type blockKind uint8

const (
	requestBlock blockKind = iota
	responseBlock
	trailerBlock
)

// wellFormed judges a header list by RFC 9113, sections 8.2 and 8.3. What a
// request must have to be one of ours is not judged.
func wellFormed(fields []hpack.HeaderField, kind blockKind) bool {
	const (
		method = 1 << iota
		scheme
		authority
		path
		status
	)
	seen, regular := 0, false
	for _, f := range fields {
		if !httpguts.ValidHeaderFieldValue(f.Value) {
			return false
		}
		if len(f.Name) == 0 || f.Name[0] != ':' {
			regular = true
			if !validName(f.Name) || connectionSpecific(f) {
				return false
			}
			continue
		}
		bit := 0
		switch f.Name {
		case ":method":
			bit = method
		case ":scheme":
			bit = scheme
		case ":authority":
			bit = authority
		case ":path":
			bit = path
		case ":status":
			bit = status
		}
		if bit == 0 || regular || seen&bit != 0 {
			return false
		}
		seen |= bit
	}
	switch kind {
	case requestBlock:
		return seen&method != 0 && seen&status == 0
	case responseBlock:
		return seen == status && validStatus(fields[0].Value)
	default:
		return seen == 0
	}
}

func validStatus(s string) bool {
	return len(s) == 3 && s[0] >= '1' && s[0] <= '9' && s[1] >= '0' && s[1] <= '9' && s[2] >= '0' && s[2] <= '9'
}

func validName(s string) bool {
	if len(s) == 0 {
		return false
	}
	for i := range len(s) {
		b := s[i]
		if b >= 0x80 || b >= 'A' && b <= 'Z' || !httpguts.IsTokenRune(rune(b)) {
			return false
		}
	}
	return true
}

// connectionSpecific is RFC 9113, section 8.2.2.
func connectionSpecific(f hpack.HeaderField) bool {
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return true
	case "te":
		return f.Value != "trailers"
	}
	return false
}
