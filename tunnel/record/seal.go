// SPDX-License-Identifier: Apache-2.0

package record

import (
	"encoding/binary"
	"slices"
)

// Seal makes a record of the n bytes of application data that lie at
// slot[HeaderLen:], in place: it writes the header before them and the type and
// the tag behind them, and returns the record's length, n+Overhead. Nothing is
// allocated. slot needs a capacity of n+Overhead, and n is at most MaxPlaintext:
// else it panics.
//
// It returns 0, and writes nothing, on a Layer that is frozen or closed, and
// after 2^24 records without a call of Due.
func (l *Layer) Seal(slot []byte, n int) int {
	if n > MaxPlaintext {
		panic("record: more than MaxPlaintext bytes to seal")
	}
	end := HeaderLen + n
	slot = slot[: end+typeLen+tagLen : end+typeLen+tagLen]
	if l.out.aead == nil || l.out.seq >= maxSealed {
		return 0
	}
	size := n + typeLen + tagLen
	slot[0], slot[1], slot[2], slot[3], slot[4] = typeApplicationData, 3, 3, byte(size>>8), byte(size)
	slot[end] = typeApplicationData
	l.out.aead.Seal(slot[HeaderLen:HeaderLen], l.out.next(), slot[HeaderLen:end+typeLen], slot[:HeaderLen])
	return HeaderLen + size
}

// NeedsControl reports whether Due has something to append.
func (l *Layer) NeedsControl() bool {
	return (l.reply || l.out.seq >= rekeyAfter || l.in.seq >= rekeyAfter && !l.asked) &&
		l.out.aead != nil && !l.alerted
}

// Due appends the sealed records that have to be sent before further data, and
// returns dst as it is when there are none: the answer to a peer's KeyUpdate,
// our own before the key is worn out, and the request for the peer's when it has
// worn out its key. (A peer that does not answer is not cut off: crypto/tls and
// OpenSSL 3.0 never update on their own, but do when asked.) What it appends is
// to be sent before anything that is sealed later.
func (l *Layer) Due(dst []byte) []byte {
	if !l.NeedsControl() {
		return dst
	}
	return l.UpdateKeys(dst, l.in.seq >= rekeyAfter && !l.asked)
}

// UpdateKeys appends a KeyUpdate and moves the writing key on, whether or not it
// is due; request asks the peer to do the same. It appends nothing on a Layer
// that cannot send.
func (l *Layer) UpdateKeys(dst []byte, request bool) []byte {
	if l.out.aead == nil || l.alerted {
		return dst
	}
	r := byte(updateNotRequested)
	if request {
		r = updateRequested
		l.asked = true
	}
	l.reply = false
	dst = l.appendRecord(dst, typeHandshake, []byte{messageKeyUpdate, 0, 0, 1, r})
	if err := l.out.update(l.suite); err != nil {
		// HKDF and the AEADs fail only for lengths that New has checked.
		// Without a key nothing can leave under a wrong one.
		l.out.wipe()
	}
	return dst
}

// AppendAlert appends a sealed alert. It is the last thing to be sent: a second
// one appends nothing, nor does a Layer that is frozen or closed.
func (l *Layer) AppendAlert(dst []byte, alert uint8) []byte {
	if l.out.aead == nil || l.alerted {
		return dst
	}
	l.alerted = true
	const warning, fatal = 1, 2
	level := byte(fatal)
	if alert == AlertCloseNotify || alert == AlertUserCanceled {
		level = warning
	}
	return l.appendRecord(dst, typeAlert, []byte{level, alert})
}

// appendRecord appends a sealed record of any type.
func (l *Layer) appendRecord(dst []byte, typ byte, p []byte) []byte {
	start := len(dst)
	size := len(p) + typeLen + tagLen
	dst = slices.Grow(dst, HeaderLen+size)
	dst = append(dst, typeApplicationData, 3, 3)
	dst = binary.BigEndian.AppendUint16(dst, uint16(size))
	dst = append(dst, p...)
	dst = append(dst, typ)
	body := dst[start+HeaderLen:]
	l.out.aead.Seal(body[:0], l.out.next(), body, dst[start:start+HeaderLen])
	return dst[:start+HeaderLen+size]
}
