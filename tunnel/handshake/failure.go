// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"syscall"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

var errNoALPN = errors.New("no common application protocol")

// FromAlert makes a handshake failure of a fatal alert: at a client the first
// record after the handshake may be the server's refusal of its certificate.
func FromAlert(a *record.PeerAlert) *identity.Failure {
	return &identity.Failure{Reason: identity.ReasonRefusedByPeer, Detail: record.AlertName(a.Alert), Err: a}
}

// failure gives a handshake's error its reason.
func (s *side) failure(err error) error {
	var f *identity.Failure
	if errors.As(err, &f) {
		return f
	}
	if a := peerAlert(err); a != nil {
		return FromAlert(a)
	}
	if s.conn.alert != record.AlertCloseNotify {
		// OpenSSL as a client still has no key to write with when it refuses
		// our certificate; crypto/tls sees a record that is not protected. Who
		// sent it nobody knows, but the handshake has ended all the same.
		f = FromAlert(&record.PeerAlert{Alert: s.conn.alert})
		f.Detail += " (sent unprotected)"
		return f
	}
	f = &identity.Failure{Reason: identity.ReasonTLSProtocol, Detail: err.Error(), Err: err}
	switch {
	case isTimeout(err):
		f.Reason = identity.ReasonTimeout
		f.Detail = fmt.Sprintf("no handshake within %v", s.cfg.Timeout)
	case s.conn.over:
		f.Detail = fmt.Sprintf("peer sent more than %d bytes before the end of the handshake", maxBytes)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		f.Detail = "peer closed the connection during the handshake"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		f.Detail = "peer reset the connection during the handshake"
	}
	return f
}

// peerAlert finds a peer's alert in an error of crypto/tls, which wraps a type
// that is not exported, a uint8, in a net.OpError.
func peerAlert(err error) *record.PeerAlert {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" || op.Err == nil {
		return nil
	}
	v := reflect.ValueOf(op.Err)
	if v.Kind() != reflect.Uint8 {
		return nil
	}
	return &record.PeerAlert{Alert: uint8(v.Uint())}
}

// sendAlert tells the peer why it is refused. Alerts are protected like all the
// rest, each side's by what it would write next: a server's by its application
// secret once it has sent Finished, and so a client's when the handshake has
// ended, else by its handshake secret. Neither has written anything under that
// key yet. An error changes nothing: the handshake has failed.
func (s *side) sendAlert(ended bool) {
	write := s.keys.server
	if s.client {
		write = s.keys.clientHandshake
		if ended {
			write = s.keys.client
		}
	}
	l, err := record.New(record.Secrets{Suite: s.suite, Client: s.client, Read: bytes.Clone(write), Write: bytes.Clone(write)})
	if err != nil {
		return
	}
	defer l.Close()
	s.conn.Conn.Write(l.AppendAlert(nil, alertFor(s.refused)))
}

// alertFor is the alert that fits a refusal best, RFC 8446 section 6.2.
func alertFor(f *identity.Failure) uint8 {
	switch f.Reason {
	case identity.ReasonTLSProtocol:
		if errors.Is(f.Err, errNoALPN) {
			return record.AlertNoApplicationProtocol
		}
		return record.AlertHandshakeFailure
	case identity.ReasonNoCertificate:
		return record.AlertCertificateRequired
	case identity.ReasonCertificateNotYetValid, identity.ReasonCertificateExpired:
		return record.AlertCertificateExpired // "or is not currently valid"
	case identity.ReasonTrustDomainUnknown:
		return record.AlertUnknownCA
	case identity.ReasonChainValidationFailed:
		var unknown x509.UnknownAuthorityError
		if errors.As(f.Err, &unknown) {
			return record.AlertUnknownCA
		}
		return record.AlertBadCertificate
	case identity.ReasonRevoked:
		return record.AlertCertificateRevoked
	case identity.ReasonIdentityMismatch:
		return record.AlertAccessDenied // "a valid certificate was received", and is not wanted
	}
	return record.AlertBadCertificate
}
