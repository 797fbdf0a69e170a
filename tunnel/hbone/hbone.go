// SPDX-License-Identifier: Apache-2.0

// Package hbone has the header fields of HBONE: an HTTP/2 CONNECT to the
// address of a workload, with the source described beside it, and its answer.
// What goes over the wire is that of Istio's ambient mode.
//
// It is pure: fields in, values out. Nothing of a request but its authority
// decides anything, and that only together with the address connected to;
// baggage, forwarded and traceparent are information by a peer that may lie.
package hbone

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// Bounds on what is taken from a peer. Longer values are ignored.
const (
	maxBaggage     = 8192 // bytes, the least that W3C Baggage asks for
	maxForwarded   = 512  // bytes
	maxTraceparent = 512  // bytes, of a later version
	maxReason      = 64   // bytes
)

// Names of fields.
const (
	fieldBaggage     = "baggage"     // W3C Baggage
	fieldForwarded   = "forwarded"   // RFC 7239
	fieldTraceparent = "traceparent" // W3C Trace Context
	fieldReason      = "culvert-reason"
)

// Request is a CONNECT.
type Request struct {
	Authority netip.AddrPort // where to; a zone is not allowed
	Baggage   Baggage        // the source workload
	Forwarded netip.AddrPort // the application's own address; the port may be 0, and all of it missing
	Trace     Trace
}

// Fields are the request's, pseudo-header fields first.
func (r Request) Fields() []hpack.HeaderField {
	fields := append(make([]hpack.HeaderField, 0, 5),
		hpack.HeaderField{Name: ":method", Value: "CONNECT"},
		hpack.HeaderField{Name: ":authority", Value: r.Authority.String()},
	)
	if b := r.Baggage.String(); b != "" {
		fields = append(fields, hpack.HeaderField{Name: fieldBaggage, Value: b})
	}
	if r.Forwarded.Addr().IsValid() {
		fields = append(fields, hpack.HeaderField{Name: fieldForwarded, Value: `for="` + r.Forwarded.String() + `"`})
	}
	if !r.Trace.IsZero() {
		fields = append(fields, hpack.HeaderField{Name: fieldTraceparent, Value: r.Trace.String()})
	}
	return fields
}

// Refusal is an answer to a request that cannot be carried out.
type Refusal struct {
	Status int
	Detail string
}

func (r *Refusal) Error() string { return strconv.Itoa(r.Status) + " " + r.Detail }

func refuse(detail string) (Request, *Refusal) {
	return Request{}, &Refusal{Status: 400, Detail: detail}
}

// ParseRequest judges the fields of a request. Malformed information beside
// the authority is ignored.
func ParseRequest(fields []hpack.HeaderField) (Request, *Refusal) {
	var r Request
	var method, authority string
	var hasMethod, hasAuthority bool
	var baggage []string
	for _, f := range fields {
		switch f.Name {
		case ":method":
			if hasMethod {
				return refuse("two methods")
			}
			method, hasMethod = f.Value, true
		case ":authority":
			if hasAuthority {
				return refuse("two authorities")
			}
			authority, hasAuthority = f.Value, true
		case fieldBaggage:
			baggage = append(baggage, f.Value)
		case fieldForwarded:
			// Of several, the first is the original (RFC 7239, section 4).
			if !r.Forwarded.IsValid() {
				r.Forwarded = parseForwarded(f.Value)
			}
		case fieldTraceparent:
			if t, ok := parseTrace(f.Value); ok && r.Trace.IsZero() && len(f.Value) <= maxTraceparent {
				r.Trace = t
			}
		default:
			if strings.HasPrefix(f.Name, ":") { // RFC 9113, section 8.5
				return refuse("CONNECT with " + strconv.Quote(clip(f.Name)))
			}
		}
	}
	if method != "CONNECT" {
		return refuse("method is not CONNECT")
	}
	a, ok := parseAuthority(authority)
	if !ok {
		return refuse("authority is not ip:port: " + strconv.Quote(clip(authority)))
	}
	r.Authority = a
	r.Baggage = parseBaggage(baggage)
	return r, nil
}

// parseAuthority takes ip:port or [v6]:port, in exactly the form in which it
// would be written again.
func parseAuthority(s string) (netip.AddrPort, bool) {
	if len(s) > 64 { // the longest is of 47 characters
		return netip.AddrPort{}, false
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 || a.Addr().Zone() != "" {
		return netip.AddrPort{}, false
	}
	// No "[::ffff:10.0.0.1]:80", which is 10.0.0.1 to some, nor "+80".
	if a.Addr().Is4In6() || !decimal(s[strings.LastIndexByte(s, ':')+1:]) {
		return netip.AddrPort{}, false
	}
	return a, true
}

func decimal(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return len(s) > 0 && s[0] != '0'
}

// parseForwarded takes the address of the first for= of a Forwarded field, or
// nothing.
func parseForwarded(s string) netip.AddrPort {
	if len(s) > maxForwarded {
		return netip.AddrPort{}
	}
	s, _, _ = strings.Cut(s, ",")
	for s != "" {
		var pair string
		pair, s, _ = strings.Cut(s, ";")
		name, v, _ := strings.Cut(strings.TrimSpace(pair), "=")
		if !strings.EqualFold(name, "for") {
			continue
		}
		if n := len(v); n >= 2 && v[0] == '"' && v[n-1] == '"' {
			v = v[1 : n-1]
		}
		a, err := netip.ParseAddrPort(v)
		if err != nil { // the port may be missing
			ip, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(v, "["), "]"))
			if err != nil {
				return netip.AddrPort{}
			}
			a = netip.AddrPortFrom(ip, 0)
		}
		if a.Addr().Zone() != "" {
			return netip.AddrPort{}
		}
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	return netip.AddrPort{}
}

// clip shortens what a peer sent, for an error.
func clip(s string) string { return s[:min(len(s), 64)] }

// ResponseFields are the fields of an answer. A refusal says why, in a word of
// the closed list of connection reasons: where the peer is not ours, it ignores
// that.
func ResponseFields(status int, reason string) []hpack.HeaderField {
	f := []hpack.HeaderField{{Name: ":status", Value: strconv.Itoa(status)}}
	if reason != "" {
		f = append(f, hpack.HeaderField{Name: fieldReason, Value: reason})
	}
	return f
}

// ResponseError is an answer that is none.
type ResponseError struct{ Detail string }

func (e *ResponseError) Error() string { return "answer to CONNECT: " + e.Detail }

// ParseResponse takes the status of an answer, and the reason if there is one.
// A reason that is no plain word is left out.
func ParseResponse(fields []hpack.HeaderField) (status int, reason string, err error) {
	i := slices.IndexFunc(fields, func(f hpack.HeaderField) bool { return f.Name == ":status" })
	if i < 0 {
		return 0, "", &ResponseError{"no status"}
	}
	v := fields[i].Value
	if len(v) != 3 || !decimal(v) {
		return 0, "", &ResponseError{"status is " + strconv.Quote(clip(v))}
	}
	status, _ = strconv.Atoi(v) // three digits
	for _, f := range fields {
		if f.Name == fieldReason && word(f.Value) {
			reason = f.Value
		}
	}
	return status, reason, nil
}

// word reports whether s may be a reason: it goes into logs and metrics.
func word(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && c != '_' {
			return false
		}
	}
	return len(s) > 0 && len(s) <= maxReason
}
