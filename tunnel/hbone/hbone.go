// SPDX-License-Identifier: Apache-2.0

// Package hbone is the meaning of a tunnel's header fields: the CONNECT request
// and its answer, as Istio's ambient mode has them (HBONE). It is pure:
// fields in, values out, and back. Nothing in them is trusted: who the peer is
// says its certificate.
package hbone

import (
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// Bounds of what is taken from a peer, in bytes.
const (
	maxValue  = 253 // of one value of the baggage: a name of Kubernetes is no longer
	maxReason = 64
	maxDetail = 128 // of a peer's string in a message
)

// ReasonField carries a refusal's reason from one Culvert to another.
const ReasonField = "culvert-reason"

// Request is a CONNECT request.
type Request struct {
	Authority   netip.AddrPort // where to: the :authority
	Baggage     Baggage        // who asks, as it says
	Forwarded   netip.AddrPort // the address it asks for, as it says; may be zero
	Traceparent string         // W3C Trace Context; may be empty
}

// Refusal says how a request is to be answered that cannot be carried out.
type Refusal struct {
	Status int
	Detail string // for the log
}

// Error makes a Refusal usable as an error.
func (r *Refusal) Error() string { return r.Detail }

// AppendFields appends the request's header fields.
func (r Request) AppendFields(dst []hpack.HeaderField) []hpack.HeaderField {
	dst = append(dst,
		hpack.HeaderField{Name: ":method", Value: http.MethodConnect},
		hpack.HeaderField{Name: ":authority", Value: r.Authority.String()},
	)
	if b := r.Baggage.String(); b != "" {
		dst = append(dst, hpack.HeaderField{Name: "baggage", Value: b})
	}
	if r.Forwarded.IsValid() {
		// RFC 7239, section 6: with a port, and for IPv6, it is quoted.
		dst = append(dst, hpack.HeaderField{Name: "forwarded", Value: `for="` + r.Forwarded.String() + `"`})
	}
	if r.Traceparent != "" {
		dst = append(dst, hpack.HeaderField{Name: "traceparent", Value: r.Traceparent})
	}
	return dst
}

// ParseRequest reads a request whose fields are well formed (tunnel/h2 sees to
// that). What is for information only and cannot be read is left out.
func ParseRequest(fields []hpack.HeaderField) (Request, *Refusal) {
	var r Request
	var method, authority string
	for _, f := range fields {
		switch f.Name {
		case ":method":
			method = f.Value
		case ":authority":
			authority = f.Value
		case ":scheme", ":path", ":protocol":
			return r, badRequest("CONNECT has no %s", f.Name)
		case "baggage":
			r.Baggage.parse(f.Value)
		case "forwarded":
			if !r.Forwarded.IsValid() {
				r.Forwarded = parseForwarded(f.Value)
			}
		case "traceparent":
			if r.Traceparent == "" && validTraceparent(f.Value) {
				r.Traceparent = f.Value
			}
		}
	}
	if method != http.MethodConnect {
		return r, badRequest("method is %s, not CONNECT", quote(method))
	}
	a, ok := parseAddrPort(authority)
	if !ok || a.Port() == 0 {
		return r, badRequest("authority %s is not an address and a port", quote(authority))
	}
	r.Authority = a
	return r, nil
}

func badRequest(format string, args ...any) *Refusal {
	return &Refusal{Status: http.StatusBadRequest, Detail: fmt.Sprintf(format, args...)}
}

// parseAddrPort parses ip:port or [v6]:port, strictly: no zone, no address of
// one family in the clothes of the other, a port without sign or zeros in
// front.
func parseAddrPort(s string) (netip.AddrPort, bool) {
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Addr().Zone() != "" || a.Addr().Is4In6() {
		return netip.AddrPort{}, false
	}
	if port := s[strings.LastIndexByte(s, ':')+1:]; port != strconv.Itoa(int(a.Port())) {
		return netip.AddrPort{}, false
	}
	return a, true
}

// parseForwarded takes the first for= that is an address out of a Forwarded
// field (RFC 7239, section 4). The port is 0 where there is none.
func parseForwarded(s string) netip.AddrPort {
	s, _, _ = strings.Cut(s, ",") // the first element is the one nearest to the client
	for pair := range strings.SplitSeq(s, ";") {
		name, value, ok := strings.Cut(strings.TrimSpace(pair), "=")
		if !ok || !strings.EqualFold(name, "for") {
			continue
		}
		if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
			value = value[1 : len(value)-1]
		}
		if a, ok := parseAddrPort(value); ok {
			return a
		}
		bare := value
		if len(bare) >= 2 && bare[0] == '[' && bare[len(bare)-1] == ']' {
			bare = bare[1 : len(bare)-1]
		}
		if a, err := netip.ParseAddr(bare); err == nil && a.Zone() == "" && !a.Is4In6() {
			return netip.AddrPortFrom(a, 0)
		}
		return netip.AddrPort{}
	}
	return netip.AddrPort{}
}

// validTraceparent checks version 00 of W3C Trace Context, section 3.2, and
// later ones as far as it says how.
func validTraceparent(s string) bool {
	const length = 55 // bytes of version 00
	if len(s) < length || len(s) > maxDetail || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return false
	}
	version, trace, parent, flags := s[:2], s[3:35], s[36:52], s[53:55]
	switch {
	case !lowerHex(version), !lowerHex(trace), !lowerHex(parent), !lowerHex(flags):
		return false
	case version == "ff", strings.Trim(trace, "0") == "", strings.Trim(parent, "0") == "":
		return false
	case version == "00":
		return len(s) == length
	}
	return len(s) == length || s[length] == '-'
}

func lowerHex(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// ResponseFields is the answer to a request: 200, or a refusal with the reason
// of the connection's record.
func ResponseFields(status int, reason string) []hpack.HeaderField {
	fields := []hpack.HeaderField{{Name: ":status", Value: strconv.Itoa(status)}}
	if reason != "" {
		fields = append(fields, hpack.HeaderField{Name: ReasonField, Value: reason})
	}
	return fields
}

// ParseResponse reads an answer. reason is empty when the peer gives none, or
// none that is a word of our kind.
func ParseResponse(fields []hpack.HeaderField) (status int, reason string, err error) {
	for _, f := range fields {
		switch f.Name {
		case ":status":
			n, err := strconv.Atoi(f.Value)
			if err != nil || len(f.Value) != 3 || n < 100 || n > 999 {
				return 0, "", fmt.Errorf("parse answer: status is %s", quote(f.Value))
			}
			status = n
		case ReasonField:
			if reason == "" && validReason(f.Value) {
				reason = f.Value
			}
		}
	}
	if status == 0 {
		return 0, "", fmt.Errorf("parse answer: no status")
	}
	return status, reason, nil
}

// validReason: the peer's word goes into the log.
func validReason(s string) bool {
	if len(s) > maxReason {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; c != '_' && (c < 'a' || c > 'z') {
			return false
		}
	}
	return s != ""
}

// quote shortens a peer's string for a message.
func quote(s string) string {
	if len(s) > maxDetail {
		s = s[:maxDetail]
	}
	return strconv.QuoteToASCII(s)
}
