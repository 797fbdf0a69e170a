// SPDX-License-Identifier: Apache-2.0

// Package record protects TLS 1.3 records (RFC 8446 section 5) once a handshake
// has ended: application data, alerts, and the messages that may follow a
// handshake (KeyUpdate, NewSessionTicket). It opens and seals in place and
// without allocation.
//
// It makes no handshake (tunnel/handshake does, by crypto/tls), reads and writes
// no socket, starts no goroutine and knows no time. A connection that ends
// without close_notify is truncated: only the owner of the socket sees that, and
// has to say so. Session tickets are taken and thrown away; early data,
// post-handshake authentication and renegotiation do not exist here.
//
// A Layer belongs to one goroutine at a time. Its owner calls Close when the
// connection ends, so that the traffic secrets are overwritten; what the AEADs
// hold is the collector's.
package record

import (
	"errors"
	"fmt"
)

// Sizes in bytes, RFC 8446 sections 5.1 and 5.2. All three suites have a tag of
// 16 bytes.
const (
	HeaderLen    = 5     // type, legacy version, length
	MaxPlaintext = 16384 // application data in one record

	tagLen   = 16
	typeLen  = 1 // the inner content type behind the data
	Overhead = HeaderLen + typeLen + tagLen
	SlotLen  = HeaderLen + MaxPlaintext + typeLen + tagLen // a record of the greatest length

	// maxCiphertext is what may follow a header. RFC 8446 section 5.2 allows
	// 2^14+256 there and 2^14+1 after decryption; with a tag of 16 bytes the
	// second is the stricter, so a buffer of SlotLen holds any valid record.
	maxCiphertext = MaxPlaintext + typeLen + tagLen
)

// Content types, RFC 8446 section 5.1.
const (
	typeChangeCipherSpec = 20
	typeAlert            = 21
	typeHandshake        = 22
	typeApplicationData  = 23
)

// Bounds on what a peer may make us do.
const (
	// maxUseless is how many records in a row may bring no application data:
	// empty ones, KeyUpdates, tickets, user_canceled. OpenSSL allows 32 empty
	// records and BoringSSL 32 KeyUpdates, crypto/tls 16 of both together.
	maxUseless = 32

	// maxMessage is the greatest length in bytes of a message after the
	// handshake. A ticket's own field ends at 2^16-1 bytes; those seen are
	// below 4 KiB, also with a client's certificate inside. Nothing of it is
	// kept.
	maxMessage = 1 << 16
)

// Records under one key. RFC 8446 section 5.5: AES-GCM is good for 2^24.5
// records of full size; ChaCha20-Poly1305 for any number, and is treated alike.
const (
	// rekeyAfter records are sealed, or opened, before Due updates the key, or
	// asks the peer to. At full size this is 137 GB.
	rekeyAfter = 1 << 23

	// maxSealed is where Seal refuses. Only an owner that never calls Due gets
	// there.
	maxSealed = 1 << 24
)

// ErrUnusable is returned by a Layer that was frozen or closed.
var ErrUnusable = errors.New("record layer is frozen or closed")

// Secrets is what a handshake leaves behind. New takes the slices over: they
// are overwritten later.
type Secrets struct {
	Suite  uint16 // tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384 or tls.TLS_CHACHA20_POLY1305_SHA256
	Client bool   // this side is the client, to which alone tickets may be sent
	Read   []byte // the peer's application_traffic_secret_0
	Write  []byte // our own
}

// Layer is both directions of one connection. It is not safe for concurrent
// use.
type Layer struct {
	in, out half
	suite   *suite
	client  bool

	err     error // sticky, from Open: after it nothing is accepted
	useless int   // records since the last application data

	// The message after the handshake that is being received: its header and
	// the first byte of its body, and how much of its body is still to come.
	msg     [5]byte
	msgHave int
	msgLeft int

	reply   bool // the peer asked for a KeyUpdate of ours
	asked   bool // we asked the peer for one, and wait
	alerted bool // we have sent an alert, the last thing we send
}

// New makes a Layer of the two traffic secrets. It refuses unknown suites and
// secrets that are not as long as the suite's hash.
func New(s Secrets) (*Layer, error) {
	su, err := suiteOf(s.Suite)
	if err != nil {
		return nil, err
	}
	l := &Layer{suite: su, client: s.Client}
	if err := l.in.set(su, s.Read); err != nil {
		return nil, fmt.Errorf("derive read key: %w", err)
	}
	if err := l.out.set(su, s.Write); err != nil {
		return nil, fmt.Errorf("derive write key: %w", err)
	}
	return l, nil
}

// Close overwrites the secrets; the Layer returns ErrUnusable from then on. It
// sends nothing.
func (l *Layer) Close() {
	l.in.wipe()
	l.out.wipe()
	if l.err == nil {
		l.err = ErrUnusable
	}
}
