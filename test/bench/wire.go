// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/tls"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
)

// hello is what a server has chosen, in TLS 1.3 (RFC 8446, section 4.1.3): the
// one message that says so in plaintext.
type hello struct {
	suite uint16
	group tls.CurveID
}

func (h hello) String() string {
	return fmt.Sprintf("TLS 1.3, %s, %s", tls.CipherSuiteName(h.suite), h.group)
}

// findHello looks for a ServerHello anywhere in some frames.
func findHello(frames []byte) (hello, bool) {
	const head = 5 // of a record: type, legacy_record_version, length
	for at := range frames {
		if !bytes.HasPrefix(frames[at:], []byte{22, 3, 3}) {
			continue
		}
		if h, ok := parseHello(frames[min(at+head, len(frames)):]); ok {
			return h, true
		}
	}
	return hello{}, false
}

func parseHello(b []byte) (h hello, ok bool) {
	const (
		serverHello       = 2
		supportedVersions = 43
		keyShare          = 51
	)
	var kind uint8
	var body, extensions cryptobyte.String
	record := cryptobyte.String(b)
	if !record.ReadUint8(&kind) || kind != serverHello || !record.ReadUint24LengthPrefixed(&body) ||
		!body.Skip(2+32) || // legacy_version, random
		!body.ReadUint8LengthPrefixed(new(cryptobyte.String)) || // legacy_session_id_echo
		!body.ReadUint16(&h.suite) || !body.Skip(1) || // legacy_compression_method
		!body.ReadUint16LengthPrefixed(&extensions) {
		return h, false
	}
	for !extensions.Empty() {
		var extension, value uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&extension) || !extensions.ReadUint16LengthPrefixed(&data) || !data.ReadUint16(&value) {
			return h, false
		}
		switch extension {
		case supportedVersions:
			ok = value == tls.VersionTLS13
		case keyShare:
			h.group = tls.CurveID(value)
		}
	}
	return h, ok && h.group != 0
}
