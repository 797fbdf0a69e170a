// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// TCP flags as they stand in the header (RFC 9293, section 3.1).
const (
	FIN uint8 = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// Segment is one TCP segment as it was seen. On a veth a segment may be up to 64 KiB, since the kernel hands over
// what was never cut to the interface's MTU.
type Segment struct {
	Time     time.Time // as the kernel stamped it
	Src, Dst netip.AddrPort
	Seq, Ack uint32
	Flags    uint8
	Len      int // bytes of payload
}

// Has reports whether all the given flags are set.
func (s Segment) Has(flags uint8) bool { return s.Flags&flags == flags }

// Port reports whether either end uses the port.
func (s Segment) Port(port uint16) bool { return s.Src.Port() == port || s.Dst.Port() == port }

// Between reports whether both ends lie inside one of the prefixes.
func (s Segment) Between(prefixes ...netip.Prefix) bool {
	return inAny(s.Src.Addr(), prefixes) && inAny(s.Dst.Addr(), prefixes)
}

func inAny(a netip.Addr, prefixes []netip.Prefix) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// kind says what a frame turned out to be.
type kind uint8

const (
	kindOther      kind = iota // not IP, or IP without TCP
	kindTCP                    // a whole TCP segment
	kindUnreadable             // IP that may carry TCP and cannot be read: fragment, cut short, unknown extension header
)

const (
	etherIPv4   = 0x0800
	etherIPv6   = 0x86dd
	etherVLAN   = 0x8100
	etherQinQ   = 0x88a8
	etherLen    = 14
	vlanTagLen  = 4
	maxVLANTags = 2

	protoHopByHop = 0
	protoTCP      = 6
	protoRouting  = 43
	protoFragment = 44
	protoDestOpts = 60
)

// parseFrame reads an Ethernet frame down to the payload of TCP. The payload aliases frame.
func parseFrame(frame []byte) (Segment, []byte, kind) {
	if len(frame) < etherLen {
		return Segment{}, nil, kindOther
	}
	etherType := binary.BigEndian.Uint16(frame[12:])
	p := frame[etherLen:]
	for i := 0; etherType == etherVLAN || etherType == etherQinQ; i++ {
		if i == maxVLANTags || len(p) < vlanTagLen {
			return Segment{}, nil, kindUnreadable
		}
		etherType = binary.BigEndian.Uint16(p[2:])
		p = p[vlanTagLen:]
	}
	switch etherType {
	case etherIPv4:
		return parseIPv4(p)
	case etherIPv6:
		return parseIPv6(p)
	}
	return Segment{}, nil, kindOther
}

func parseIPv4(p []byte) (Segment, []byte, kind) {
	const minHeader = 20
	if len(p) < minHeader || p[0]>>4 != 4 {
		return Segment{}, nil, kindUnreadable
	}
	header, total := int(p[0]&0xf)*4, int(binary.BigEndian.Uint16(p[2:]))
	if total == 0 { // Linux, BIG TCP: longer than the field can say
		total = len(p)
	}
	if header < minHeader || total < header || len(p) < total {
		return Segment{}, nil, kindUnreadable
	}
	if p[9] != protoTCP {
		return Segment{}, nil, kindOther
	}
	if fragment := binary.BigEndian.Uint16(p[6:]); fragment&0x3fff != 0 { // more fragments, or an offset
		return Segment{}, nil, kindUnreadable
	}
	src, dst := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	return parseTCP(src, dst, p[header:total])
}

func parseIPv6(p []byte) (Segment, []byte, kind) {
	const header = 40
	if len(p) < header || p[0]>>4 != 6 {
		return Segment{}, nil, kindUnreadable
	}
	next, length := p[6], int(binary.BigEndian.Uint16(p[4:]))
	src, dst := netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	p = p[header:]
	if length == 0 { // a jumbogram (RFC 2675), or Linux's BIG TCP
		length = len(p)
	}
	if len(p) < length {
		return Segment{}, nil, kindUnreadable
	}
	p = p[:length]
	for {
		switch next {
		case protoTCP:
			return parseTCP(src, dst, p)
		case protoHopByHop, protoRouting, protoDestOpts:
			if len(p) < 8 {
				return Segment{}, nil, kindUnreadable
			}
			n := 8 + int(p[1])*8
			if len(p) < n {
				return Segment{}, nil, kindUnreadable
			}
			next, p = p[0], p[n:]
		case protoFragment:
			return Segment{}, nil, kindUnreadable
		default:
			return Segment{}, nil, kindOther
		}
	}
}

func parseTCP(src, dst netip.Addr, p []byte) (Segment, []byte, kind) {
	const minHeader = 20
	if len(p) < minHeader {
		return Segment{}, nil, kindUnreadable
	}
	header := int(p[12]>>4) * 4
	if header < minHeader || len(p) < header {
		return Segment{}, nil, kindUnreadable
	}
	payload := p[header:]
	return Segment{
		Src:   netip.AddrPortFrom(src, binary.BigEndian.Uint16(p)),
		Dst:   netip.AddrPortFrom(dst, binary.BigEndian.Uint16(p[2:])),
		Seq:   binary.BigEndian.Uint32(p[4:]),
		Ack:   binary.BigEndian.Uint32(p[8:]),
		Flags: p[13],
		Len:   len(payload),
	}, payload, kindTCP
}
