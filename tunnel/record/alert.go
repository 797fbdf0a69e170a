// SPDX-License-Identifier: Apache-2.0

package record

import (
	"fmt"
	"strconv"
)

// Alerts that are sent or looked at by name, RFC 8446 section 6.
const (
	AlertCloseNotify           = 0
	AlertUnexpectedMessage     = 10
	AlertBadRecordMAC          = 20
	AlertRecordOverflow        = 22
	AlertHandshakeFailure      = 40
	AlertBadCertificate        = 42
	AlertCertificateRevoked    = 44
	AlertCertificateExpired    = 45
	AlertCertificateUnknown    = 46
	AlertIllegalParameter      = 47
	AlertUnknownCA             = 48
	AlertAccessDenied          = 49
	AlertDecodeError           = 50
	AlertProtocolVersion       = 70
	AlertInternalError         = 80
	AlertUserCanceled          = 90
	AlertCertificateRequired   = 116
	AlertNoApplicationProtocol = 120
)

// AlertName is the alert's name as RFC 8446 section 6 writes it, or its number
// for an unknown one.
func AlertName(alert uint8) string {
	switch alert {
	case AlertCloseNotify:
		return "close_notify"
	case AlertUnexpectedMessage:
		return "unexpected_message"
	case AlertBadRecordMAC:
		return "bad_record_mac"
	case AlertRecordOverflow:
		return "record_overflow"
	case AlertHandshakeFailure:
		return "handshake_failure"
	case AlertBadCertificate:
		return "bad_certificate"
	case 43:
		return "unsupported_certificate"
	case AlertCertificateRevoked:
		return "certificate_revoked"
	case AlertCertificateExpired:
		return "certificate_expired"
	case AlertCertificateUnknown:
		return "certificate_unknown"
	case AlertIllegalParameter:
		return "illegal_parameter"
	case AlertUnknownCA:
		return "unknown_ca"
	case AlertAccessDenied:
		return "access_denied"
	case AlertDecodeError:
		return "decode_error"
	case 51:
		return "decrypt_error"
	case AlertProtocolVersion:
		return "protocol_version"
	case 71:
		return "insufficient_security"
	case AlertInternalError:
		return "internal_error"
	case 86:
		return "inappropriate_fallback"
	case AlertUserCanceled:
		return "user_canceled"
	case 109:
		return "missing_extension"
	case 110:
		return "unsupported_extension"
	case 112:
		return "unrecognized_name"
	case 113:
		return "bad_certificate_status_response"
	case 115:
		return "unknown_psk_identity"
	case AlertCertificateRequired:
		return "certificate_required"
	case AlertNoApplicationProtocol:
		return "no_application_protocol"
	}
	return "alert " + strconv.Itoa(int(alert))
}

// LocalAlert is the peer's violation. The owner of the socket sends the alert
// (AppendAlert) and ends the connection.
type LocalAlert struct {
	Alert  uint8
	Detail string
}

func (e *LocalAlert) Error() string {
	return fmt.Sprintf("peer broke TLS: %s: %s", AlertName(e.Alert), e.Detail)
}

// PeerAlert is a fatal alert that the peer has sent. The connection has ended.
type PeerAlert struct {
	Alert uint8
}

func (e *PeerAlert) Error() string {
	return "peer sent alert " + AlertName(e.Alert)
}
