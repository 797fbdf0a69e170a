// SPDX-License-Identifier: Apache-2.0

package record

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Open takes one record from the front of b and decrypts it in place.
//
// n is the record's length in b, 0 if the record is not whole yet. data is
// application data and aliases b; it is empty for every other kind of record,
// and may be for application data too. A buffer of SlotLen holds any record that
// Open accepts.
//
// The errors end the connection and come back at every further call: io.EOF
// after close_notify, *LocalAlert when the peer broke the protocol (the alert is
// for the caller to send), *PeerAlert when the peer sent a fatal one, and
// ErrUnusable.
func (l *Layer) Open(b []byte) (data []byte, n int, err error) {
	if l.err != nil {
		return nil, 0, l.err
	}
	if len(b) < HeaderLen {
		return nil, 0, nil
	}
	// The legacy version is ignored (RFC 8446 section 5.1), and authenticated
	// with the rest of the header.
	size := int(binary.BigEndian.Uint16(b[3:]))
	if b[0] != typeApplicationData {
		return nil, 0, l.outer(b[0])
	}
	if size > maxCiphertext {
		return nil, 0, l.violation(AlertRecordOverflow, "record of %d bytes", size)
	}
	n = HeaderLen + size
	if len(b) < n {
		return nil, 0, nil
	}
	body := b[HeaderLen:n:n]
	inner, err := l.in.aead.Open(body[:0], l.in.next(), body, b[:HeaderLen])
	if err != nil {
		return nil, 0, l.violation(AlertBadRecordMAC, "record %d of %d bytes", l.in.seq-1, size)
	}

	// The last byte that is not zero is the type, what follows it is padding.
	i := len(inner) - 1
	for i >= 0 && inner[i] == 0 {
		i--
	}
	if i > 0 && inner[i] == typeApplicationData && l.msgHave == 0 {
		l.useless = 0
		return inner[:i:i], n, nil
	}
	if i < 0 {
		return nil, 0, l.violation(AlertUnexpectedMessage, "record without a type")
	}
	if err := l.control(inner[i], inner[:i]); err != nil {
		return nil, n, err
	}
	return nil, n, nil
}

// outer refuses a record that is not protected. Change_cipher_spec is allowed
// only before the peer's Finished, RFC 8446 section 5.
func (l *Layer) outer(typ byte) error {
	return l.violation(AlertUnexpectedMessage, "unprotected record of type %d", typ)
}

// control takes every record but application data that carries something.
func (l *Layer) control(typ byte, p []byte) error {
	if l.useless++; l.useless > maxUseless {
		return l.violation(AlertUnexpectedMessage, "%d records in a row without data", l.useless)
	}
	switch typ {
	case typeApplicationData:
		if l.msgHave > 0 {
			return l.violation(AlertUnexpectedMessage, "data inside a split message")
		}
		return nil // empty: allowed, a cover for traffic analysis (RFC 8446 section 5.1)
	case typeHandshake:
		return l.messages(p)
	case typeAlert:
		// Also inside a split message: the connection ends either way, and the
		// peer's reason is worth more than ours.
		return l.alert(p)
	}
	return l.violation(AlertUnexpectedMessage, "record of inner type %d", typ)
}

// alert takes an alert record. The level is ignored: in TLS 1.3 all but two are
// fatal, RFC 8446 section 6.
func (l *Layer) alert(p []byte) error {
	if len(p) != 2 {
		return l.violation(AlertDecodeError, "alert of %d bytes", len(p))
	}
	switch p[1] {
	case AlertCloseNotify:
		l.err = io.EOF
	case AlertUserCanceled: // close_notify follows
		return nil
	default:
		l.err = &PeerAlert{Alert: p[1]}
	}
	return l.err
}

// violation makes the error sticky and returns it.
func (l *Layer) violation(alert uint8, format string, args ...any) error {
	l.err = &LocalAlert{Alert: alert, Detail: fmt.Sprintf(format, args...)}
	return l.err
}
