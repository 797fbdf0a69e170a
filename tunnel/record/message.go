// SPDX-License-Identifier: Apache-2.0

package record

// Messages after the handshake, RFC 8446 section 4.
const (
	messageHeaderLen = 4 // bytes: type, length of 24 bits

	messageNewSessionTicket = 4
	messageKeyUpdate        = 24
)

// KeyUpdate's one byte, RFC 8446 section 4.6.3.
const (
	updateNotRequested = 0
	updateRequested    = 1
)

// messages takes the content of a handshake record: messages may be split over
// records and joined in one. Only a message's header and the first byte of its
// body are kept.
func (l *Layer) messages(p []byte) error {
	if len(p) == 0 {
		return l.violation(AlertUnexpectedMessage, "empty handshake record")
	}
	for len(p) > 0 {
		if l.msgHave < messageHeaderLen {
			k := copy(l.msg[l.msgHave:messageHeaderLen], p)
			l.msgHave += k
			p = p[k:]
			if l.msgHave < messageHeaderLen {
				return nil
			}
			l.msgLeft = int(l.msg[1])<<16 | int(l.msg[2])<<8 | int(l.msg[3])
			if err := l.message(l.msg[0], l.msgLeft); err != nil {
				return err
			}
		}
		k := min(l.msgLeft, len(p))
		if k > 0 && l.msgHave == messageHeaderLen {
			l.msg[messageHeaderLen] = p[0]
			l.msgHave++
		}
		l.msgLeft -= k
		p = p[k:]
		if l.msgLeft > 0 {
			return nil
		}
		l.msgHave = 0
		if l.msg[0] == messageKeyUpdate {
			if len(p) > 0 { // RFC 8446 section 5.1: a key changes at a record's end
				return l.violation(AlertUnexpectedMessage, "%d bytes behind KeyUpdate", len(p))
			}
			return l.keyUpdate(l.msg[messageHeaderLen])
		}
	}
	return nil
}

// message looks at a message's header.
func (l *Layer) message(typ byte, size int) error {
	switch {
	case typ == messageKeyUpdate && size != 1:
		return l.violation(AlertDecodeError, "KeyUpdate of %d bytes", size)
	case typ == messageKeyUpdate:
		return nil
	case typ == messageNewSessionTicket && l.client:
		if size == 0 || size > maxMessage {
			return l.violation(AlertDecodeError, "ticket of %d bytes", size)
		}
		return nil
	}
	return l.violation(AlertUnexpectedMessage, "message of type %d after the handshake", typ)
}

// keyUpdate moves the reading key on. Several requests before our next record
// are answered once, RFC 8446 section 4.6.3.
func (l *Layer) keyUpdate(request byte) error {
	if request > updateRequested {
		return l.violation(AlertIllegalParameter, "KeyUpdate asks for %d", request)
	}
	if err := l.in.update(l.suite); err != nil {
		return l.violation(AlertInternalError, "%v", err)
	}
	l.asked = false
	if request == updateRequested {
		l.reply = true
	}
	return nil
}
