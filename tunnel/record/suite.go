// SPDX-License-Identifier: Apache-2.0

package record

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"fmt"

	"golang.org/x/crypto/chacha20poly1305"
)

const ivLen = 12 // bytes, RFC 8446 section 5.3 with RFC 5116's N_MIN of these AEADs

// suite is a TLS 1.3 cipher suite.
type suite struct {
	id     uint16
	keyLen int // bytes
	hash   int // bytes of its output, and of a traffic secret
	expand func(secret []byte, info string, n int) ([]byte, error)
	aead   func(key []byte) (cipher.AEAD, error)
}

func suiteOf(id uint16) (*suite, error) {
	switch id {
	case tls.TLS_AES_128_GCM_SHA256:
		return &suite{id, 16, sha256.Size, expand256, newGCM}, nil
	case tls.TLS_AES_256_GCM_SHA384:
		return &suite{id, 32, sha512.Size384, expand384, newGCM}, nil
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		return &suite{id, chacha20poly1305.KeySize, sha256.Size, expand256, chacha20poly1305.New}, nil
	}
	return nil, fmt.Errorf("cipher suite %#04x is none of TLS 1.3's", id)
}

func expand256(secret []byte, info string, n int) ([]byte, error) {
	return hkdf.Expand(sha256.New, secret, info, n)
}

func expand384(secret []byte, info string, n int) ([]byte, error) {
	return hkdf.Expand(sha512.New384, secret, info, n)
}

func newGCM(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// expandLabel is HKDF-Expand-Label with an empty context, RFC 8446 section 7.1.
func (s *suite) expandLabel(secret []byte, label string, n int) ([]byte, error) {
	const prefix = "tls13 "
	info := make([]byte, 0, 4+len(prefix)+len(label))
	info = binary.BigEndian.AppendUint16(info, uint16(n))
	info = append(info, byte(len(prefix)+len(label)))
	info = append(info, prefix...)
	info = append(info, label...)
	info = append(info, 0)
	return s.expand(secret, string(info), n)
}

// half is the key of one direction.
type half struct {
	aead   cipher.AEAD // nil: unusable
	seq    uint64      // of the next record
	ivTail uint64      // the IV's last 8 bytes, which the sequence number is XORed into
	// nonce is kept here, in the heap, because what is handed to an AEAD
	// through its interface escapes: a local one would be allocated per record.
	nonce  [ivLen]byte
	secret []byte
}

// set makes secret the direction's traffic secret and overwrites the one before.
func (h *half) set(s *suite, secret []byte) error {
	if len(secret) != s.hash {
		return fmt.Errorf("traffic secret has %d bytes, want %d", len(secret), s.hash)
	}
	key, err := s.expandLabel(secret, "key", s.keyLen) // RFC 8446 section 7.3
	if err != nil {
		return err
	}
	defer clear(key)
	iv, err := s.expandLabel(secret, "iv", ivLen)
	if err != nil {
		return err
	}
	defer clear(iv)
	aead, err := s.aead(key)
	if err != nil {
		return err
	}
	h.wipe()
	h.aead, h.secret, h.seq = aead, secret, 0
	copy(h.nonce[:], iv)
	h.ivTail = binary.BigEndian.Uint64(iv[ivLen-8:])
	return nil
}

// update moves to the next generation, RFC 8446 section 7.2.
func (h *half) update(s *suite) error {
	next, err := s.expandLabel(h.secret, "traffic upd", s.hash)
	if err != nil {
		return err
	}
	return h.set(s, next)
}

// next gives the next record's nonce and counts the record, RFC 8446 section
// 5.3. The sequence number cannot wrap: keys are updated long before 2^64.
func (h *half) next() []byte {
	binary.BigEndian.PutUint64(h.nonce[ivLen-8:], h.ivTail^h.seq)
	h.seq++
	return h.nonce[:]
}

func (h *half) wipe() {
	clear(h.secret)
	*h = half{}
}
