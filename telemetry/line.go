// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"crypto/tls"
	"encoding/hex"
	"net/netip"
	"strconv"
	"time"
	"unicode/utf8"
)

const (
	// timeLayout is RFC 3339 in UTC with microseconds, at a fixed width.
	timeLayout = "2006-01-02T15:04:05.000000Z07:00"
	// maxDetail is how many bytes of a record's detail go into a line: part of
	// it may come from a peer.
	maxDetail = 512
)

// appendJSON writes a connection as one line of JSON. Fields whose value is not
// known are left out; the names are those of Istio's ztunnel where it has them.
func appendJSON(b []byte, c *Connection) []byte {
	b = append(b, `{"time":"`...)
	b = c.Start.Add(c.Duration).UTC().AppendFormat(b, timeLayout)
	b = append(b, `","level":"`...)
	b = append(b, level(c)...)
	b = append(b, `","scope":"access","message":"connection `...)
	b = append(b, c.Event.String()...)
	b = append(b, `","direction":"`...)
	b = append(b, c.Direction.String()...)
	b = append(b, '"')
	b = appendEndpointJSON(b, `,"src.`, &c.Src)
	b = appendEndpointJSON(b, `,"dst.`, &c.Dst)
	b = append(b, `,"bytes_sent":`...)
	b = strconv.AppendUint(b, c.ToClient, 10)
	b = append(b, `,"bytes_recv":`...)
	b = strconv.AppendUint(b, c.FromClient, 10)
	b = append(b, `,"start":"`...)
	b = c.Start.UTC().AppendFormat(b, timeLayout)
	b = append(b, `","duration_ms":`...)
	b = appendMillis(b, c.Duration)
	b = appendField(b, `,"connection_security_policy":"`, string(security(c)))
	if c.TLSVersion != 0 {
		b = appendField(b, `,"tls.version":"`, version(c.TLSVersion))
		b = appendField(b, `,"tls.cipher":"`, cipher(c.CipherSuite))
		if c.Group != 0 {
			b = appendField(b, `,"tls.group":"`, c.Group.String())
		}
	}
	if c.Rule != "" {
		b = appendField(b, `,"policy.rule":"`, c.Rule)
		b = append(b, `,"policy.version":`...)
		b = strconv.AppendUint(b, c.PolicyVersion, 10)
	}
	if c.Trace != [16]byte{} {
		b = append(b, `,"trace":"`...)
		b = hex.AppendEncode(b, c.Trace[:])
		b = append(b, '"')
	}
	b = appendField(b, `,"reason":"`, string(c.Reason))
	b = appendField(b, `,"detail":"`, cut(c.Detail))
	return append(b, "}\n"...)
}

func appendEndpointJSON(b []byte, prefix string, e *Endpoint) []byte {
	if e.Addr.IsValid() {
		b = append(b, prefix...)
		b = append(b, `addr":"`...)
		b = appendAddr(b, e.Addr)
		b = append(b, '"')
	}
	b = appendField2(b, prefix, `workload":"`, e.Workload)
	b = appendField2(b, prefix, `namespace":"`, e.Namespace)
	if !e.Identity.IsZero() {
		b = appendField2(b, prefix, `identity":"`, e.Identity.String())
	}
	return b
}

// appendAddr writes an address that may be v4-mapped as the IPv4 that it is, and
// without a port where that is not known.
func appendAddr(b []byte, a netip.AddrPort) []byte {
	ip := a.Addr().Unmap()
	if a.Port() == 0 {
		return ip.AppendTo(b)
	}
	return netip.AddrPortFrom(ip, a.Port()).AppendTo(b)
}

// appendField writes a name, which brings its punctuation, and a value, unless
// the value is empty.
func appendField(b []byte, name, value string) []byte {
	return appendField2(b, name, "", value)
}

func appendField2(b []byte, prefix, name, value string) []byte {
	if value == "" {
		return b
	}
	b = append(b, prefix...)
	b = append(b, name...)
	b = appendEscaped(b, value)
	return append(b, '"')
}

// appendEscaped writes the inside of a JSON string (RFC 8259 section 7). What is
// not UTF-8 becomes U+FFFD, so that a line is always valid JSON.
func appendEscaped(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= ' ' && c != '"' && c != '\\' && c != 0x7f {
				i++
				continue
			}
			b = append(b, s[start:i]...)
			switch c {
			case '"', '\\':
				b = append(b, '\\', c)
			case '\n':
				b = append(b, '\\', 'n')
			case '\r':
				b = append(b, '\\', 'r')
			case '\t':
				b = append(b, '\\', 't')
			default:
				b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
			}
			i++
			start = i
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		// C1 controls and the separators of JavaScript are escaped too: some
		// terminals and log readers act on them.
		if r == utf8.RuneError && size == 1 || r >= 0x80 && r < 0xa0 || r == 0x2028 || r == 0x2029 {
			b = append(b, s[start:i]...)
			b = append(b, '\\', 'u', hex[r>>12&15], hex[r>>8&15], hex[r>>4&15], hex[r&15])
			start = i + size
		}
		i += size
	}
	return append(b, s[start:]...)
}

// appendMillis writes milliseconds with three decimals, rounded down.
func appendMillis(b []byte, d time.Duration) []byte {
	us := max(d, 0).Microseconds()
	b = strconv.AppendInt(b, us/1000, 10)
	us %= 1000
	return append(b, '.', byte('0'+us/100), byte('0'+us/10%10), byte('0'+us%10))
}

// appendText writes a connection as one line for a person.
func appendText(b []byte, c *Connection) []byte {
	b = c.Start.Add(c.Duration).UTC().AppendFormat(b, timeLayout)
	b = append(b, ' ')
	b = append(b, c.Direction.String()...)
	b = append(b, ' ')
	b = append(b, c.Reason...)
	b = append(b, ' ')
	b = appendEndpointText(b, &c.Src)
	b = append(b, " -> "...)
	b = appendEndpointText(b, &c.Dst)
	b = append(b, " sent="...)
	b = strconv.AppendUint(b, c.ToClient, 10)
	b = append(b, " received="...)
	b = strconv.AppendUint(b, c.FromClient, 10)
	b = append(b, " duration="...)
	b = appendMillis(b, c.Duration)
	b = append(b, "ms "...)
	b = append(b, security(c)...)
	if c.TLSVersion != 0 {
		b = append(b, " TLS"...)
		b = append(b, version(c.TLSVersion)...)
		b = append(b, ' ')
		b = append(b, cipher(c.CipherSuite)...)
		if c.Group != 0 {
			b = append(b, ' ')
			b = append(b, c.Group.String()...)
		}
	}
	if c.Rule != "" {
		b = append(b, " rule="...)
		b = appendEscaped(b, c.Rule)
	}
	if c.Trace != [16]byte{} {
		b = append(b, " trace="...)
		b = hex.AppendEncode(b, c.Trace[:])
	}
	if c.Detail != "" {
		b = append(b, ` detail="`...)
		b = appendEscaped(b, cut(c.Detail))
		b = append(b, '"')
	}
	return append(b, '\n')
}

func appendEndpointText(b []byte, e *Endpoint) []byte {
	if e.Addr.IsValid() {
		b = appendAddr(b, e.Addr)
	} else {
		b = append(b, '?')
	}
	if e.Workload == "" && e.Identity.IsZero() {
		return b
	}
	b = append(b, " ("...)
	if e.Workload != "" {
		if e.Namespace != "" {
			b = appendEscaped(b, e.Namespace)
			b = append(b, '/')
		}
		b = appendEscaped(b, e.Workload)
		if !e.Identity.IsZero() {
			b = append(b, ", "...)
		}
	}
	if !e.Identity.IsZero() {
		b = append(b, e.Identity.String()...)
	}
	return append(b, ')')
}

func level(c *Connection) string {
	if c.Reason == ReasonOK {
		return "info"
	}
	return "error"
}

func security(c *Connection) SecurityPolicy {
	if c.SecurityPolicy == "" {
		return SecurityUnknown
	}
	return c.SecurityPolicy
}

func version(v uint16) string {
	switch v {
	case tls.VersionTLS13:
		return "1.3"
	case tls.VersionTLS12:
		return "1.2"
	}
	return "0x" + strconv.FormatUint(uint64(v), 16)
}

// cipher is tls.CipherSuiteName, which allocates, without that for the suites of
// TLS 1.3.
func cipher(suite uint16) string {
	switch suite {
	case tls.TLS_AES_128_GCM_SHA256:
		return "TLS_AES_128_GCM_SHA256"
	case tls.TLS_AES_256_GCM_SHA384:
		return "TLS_AES_256_GCM_SHA384"
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		return "TLS_CHACHA20_POLY1305_SHA256"
	}
	return tls.CipherSuiteName(suite)
}

// cut shortens a detail, at the beginning of a character.
func cut(s string) string {
	if len(s) <= maxDetail {
		return s
	}
	n := maxDetail
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}
