// SPDX-License-Identifier: Apache-2.0

package hbone

import (
	"encoding/hex"
	"strings"
)

// Trace says to which trace a connection belongs: a traceparent (W3C Trace
// Context, section 3.2). The zero Trace is none.
type Trace struct {
	ID     [16]byte // the same at both ends
	Parent [8]byte  // who sends it
	Flags  byte
}

// IsZero reports whether it is none.
func (t Trace) IsZero() bool { return t == Trace{} }

// The layout of version 00: version, ID, parent and flags in hexadecimal,
// joined by hyphens.
const (
	traceLen    = 2 + 1 + 32 + 1 + 16 + 1 + 2
	traceID     = 3
	traceParent = traceID + 32 + 1
	traceFlags  = traceParent + 16 + 1
)

// String is the field's value.
func (t Trace) String() string {
	var b [traceLen]byte
	copy(b[:], "00-")
	hex.Encode(b[traceID:], t.ID[:])
	b[traceParent-1] = '-'
	hex.Encode(b[traceParent:], t.Parent[:])
	b[traceFlags-1] = '-'
	hex.Encode(b[traceFlags:], []byte{t.Flags})
	return string(b[:])
}

// parseTrace takes a field's value. Of a version above 00 it takes what 00 has
// too; what is malformed is none.
func parseTrace(s string) (t Trace, ok bool) {
	if len(s) < traceLen || s[2] != '-' || s[traceParent-1] != '-' || s[traceFlags-1] != '-' {
		return Trace{}, false
	}
	if strings.ToLower(s[:traceLen]) != s[:traceLen] { // capitals are malformed
		return Trace{}, false
	}
	var version, flags [1]byte
	if !unhex(version[:], s[:2]) || version[0] == 0xff ||
		len(s) > traceLen && (version[0] == 0 || s[traceLen] != '-') ||
		!unhex(t.ID[:], s[traceID:]) || !unhex(t.Parent[:], s[traceParent:]) || !unhex(flags[:], s[traceFlags:]) ||
		t.ID == [16]byte{} || t.Parent == [8]byte{} {
		return Trace{}, false
	}
	t.Flags = flags[0]
	return t, true
}

// unhex fills dst from the beginning of s.
func unhex(dst []byte, s string) bool {
	_, err := hex.Decode(dst, []byte(s[:2*len(dst)]))
	return err == nil
}
