// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
)

// Frames are put together here field by field, so that the parser is not tested with its own idea of them.
func ethernet(etherType uint16) []byte {
	return binary.BigEndian.AppendUint16(make([]byte, 12), etherType)
}

func frame4(protocol byte, fragment uint16, total int, p []byte) []byte {
	b := []byte{0x46, 0, 0, 0, 0, 0, byte(fragment >> 8), byte(fragment), 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1}
	if total < 0 {
		total = len(b) + len(p)
	}
	binary.BigEndian.PutUint16(b[2:], uint16(total))
	return slices.Concat(ethernet(0x0800), b, p)
}

func frame6(next byte, length int, p []byte) []byte {
	b := make([]byte, 40)
	b[0], b[6] = 0x60, next
	if length < 0 {
		length = len(p)
	}
	binary.BigEndian.PutUint16(b[4:], uint16(length))
	b[8], b[23], b[24], b[39] = 0xfd, 1, 0xfd, 2
	return slices.Concat(ethernet(0x86dd), b, p)
}

func tcp(flags byte, payload string) []byte {
	b := make([]byte, 24)
	binary.BigEndian.PutUint16(b, 1234)
	binary.BigEndian.PutUint16(b[2:], 80)
	binary.BigEndian.PutUint32(b[4:], 7)
	binary.BigEndian.PutUint32(b[8:], 9)
	b[12], b[13] = 6<<4, flags
	return append(b, payload...)
}

func TestParseFrame(t *testing.T) {
	a4, b4 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	a6, b6 := netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
	vlan := slices.Concat(make([]byte, 12), []byte{0x81, 0, 0, 5}, frame4(6, 0, -1, tcp(ACK, "x"))[12:])
	for name, c := range map[string]struct {
		frame    []byte
		src, dst netip.Addr
		payload  string
		kind     kind
	}{
		"v4":                    {frame4(6, 0x4000, -1, tcp(ACK, "hello")), a4, b4, "hello", kindTCP},
		"v4, padded":            {append(frame4(6, 0, -1, tcp(ACK, "")), 0, 0, 0), a4, b4, "", kindTCP},
		"v4, BIG TCP":           {frame4(6, 0, 0, tcp(ACK, "hello")), a4, b4, "hello", kindTCP},
		"v4, VLAN":              {vlan, a4, b4, "x", kindTCP},
		"v4, first fragment":    {frame4(6, 0x2000, -1, tcp(ACK, "hello")), a4, b4, "", kindUnreadable},
		"v4, later fragment":    {frame4(6, 3, -1, tcp(ACK, "hello")), a4, b4, "", kindUnreadable},
		"v4, cut short":         {frame4(6, 0, 200, tcp(ACK, "hello")), a4, b4, "", kindUnreadable},
		"v4, half a TCP header": {frame4(6, 0, -1, tcp(ACK, "")[:20]), a4, b4, "", kindUnreadable},
		"v4, UDP":               {frame4(17, 0, -1, []byte("12345678")), a4, b4, "", kindOther},
		"v6":                    {frame6(6, -1, tcp(ACK, "hello")), a6, b6, "hello", kindTCP},
		"v6, BIG TCP":           {frame6(6, 0, tcp(ACK, "hello")), a6, b6, "hello", kindTCP},
		"v6, hop-by-hop":        {frame6(0, -1, append([]byte{6, 1, 15: 0}, tcp(ACK, "x")...)), a6, b6, "x", kindTCP},
		"v6, fragment":          {frame6(44, -1, append([]byte{6, 7: 0}, tcp(ACK, "x")...)), a6, b6, "", kindUnreadable},
		"v6, ICMP":              {frame6(58, -1, []byte{1, 2, 3, 4}), a6, b6, "", kindOther},
		"ARP":                   {ethernet(0x0806), a4, b4, "", kindOther},
		"nothing":               {nil, a4, b4, "", kindOther},
	} {
		t.Run(name, func(t *testing.T) {
			seg, payload, k := parseFrame(c.frame)
			if k != c.kind {
				t.Fatalf("kind %d, want %d", k, c.kind)
			}
			if k != kindTCP {
				return
			}
			want := Segment{
				Src: netip.AddrPortFrom(c.src, 1234), Dst: netip.AddrPortFrom(c.dst, 80),
				Seq: 7, Ack: 9, Flags: ACK, Len: len(c.payload),
			}
			if seg != want || string(payload) != c.payload {
				t.Errorf("got %+v with %q, want %+v with %q", seg, payload, want, c.payload)
			}
		})
	}
}

func FuzzParseFrame(f *testing.F) {
	f.Add(frame4(6, 0, -1, tcp(SYN, "x")))
	f.Add(frame6(0, -1, append([]byte{6, 1, 15: 0}, tcp(ACK, "x")...)))
	f.Fuzz(func(t *testing.T, b []byte) {
		seg, payload, k := parseFrame(b)
		if k == kindTCP && seg.Len != len(payload) || len(payload) > len(b) {
			t.Errorf("%+v with %d bytes of payload", seg, len(payload))
		}
	})
}

// A marker is counted once wherever segments cut it, and not at all across a hole.
func TestMarkerAcrossSegments(t *testing.T) {
	const marker = "marker"
	src, dst := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:2")
	for name, c := range map[string]struct {
		parts []string
		hole  bool
		want  int
	}{
		"cut once":                  {parts: []string{"xxmar", "kerxx"}, want: 1},
		"cut everywhere":            {parts: []string{"m", "a", "r", "k", "e", "r", "x"}, want: 1},
		"cut twice":                 {parts: []string{"xxm", "arke", "rmark", "er"}, want: 2},
		"whole is not counted here": {parts: []string{"marker", "marker"}, want: 0},
		"a hole":                    {parts: []string{"mar", "ker"}, hole: true, want: 0},
	} {
		t.Run(name, func(t *testing.T) {
			cap := &Capture{markers: [][]byte{[]byte(marker)}, seen: make([]int, 1), flows: make(map[flow]*tail)}
			seq := uint32(1<<32 - 3) // wraps
			for _, p := range c.parts {
				cap.follow(Segment{Src: src, Dst: dst, Seq: seq, Len: len(p)}, []byte(p))
				seq += uint32(len(p))
				if c.hole {
					seq++
				}
			}
			if cap.seen[0] != c.want {
				t.Errorf("counted %d times, want %d", cap.seen[0], c.want)
			}
		})
	}
}
