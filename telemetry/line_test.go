// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"crypto/tls"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/policy"
)

func sample() Connection {
	return Connection{
		Direction: policy.Outbound,
		Src: Endpoint{
			Addr:      netip.MustParseAddrPort("10.77.1.10:43210"),
			Workload:  "client",
			Namespace: "demo",
			Identity:  spiffeid.RequireFromString("spiffe://cluster.local/ns/demo/sa/client"),
		},
		Dst: Endpoint{
			Addr:      netip.MustParseAddrPort("10.77.2.10:8080"),
			Workload:  "web",
			Namespace: "demo",
			Identity:  spiffeid.RequireFromString("spiffe://cluster.local/ns/demo/sa/web"),
		},
		FromClient:     120,
		ToClient:       4096,
		Start:          time.Date(2026, 3, 4, 5, 6, 7, 8009000, time.UTC),
		Duration:       1234567 * time.Nanosecond,
		TLSVersion:     tls.VersionTLS13,
		CipherSuite:    tls.TLS_AES_128_GCM_SHA256,
		Group:          tls.X25519MLKEM768,
		SecurityPolicy: MutualTLS,
		Reason:         ReasonOK,
		Rule:           policy.RuleDefaultAllow,
		PolicyVersion:  3,
		Trace:          [16]byte{0x0a, 0xf7, 15: 0x9c},
	}
}

// refused is a connection of which little is known, with a hostile detail.
func refused() Connection {
	return Connection{
		Event:     Refused,
		Direction: policy.Inbound,
		Src:       Endpoint{Addr: netip.MustParseAddrPort("[::ffff:10.77.1.10]:43210")},
		Dst:       Endpoint{Addr: netip.MustParseAddrPort("[fd77::2:1]:80")},
		Start:     time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC),
		Reason:    ReasonDenied,
		Rule:      "no-batch",
		Detail:    "said \"no\\\"\nand\tleft \x1b[31m\xff\u009b\u2028 ü",
	}
}

// passed is one that the kernel has let pass: its source's port is not known.
func passed() Connection {
	return Connection{
		Event:          Passed,
		Direction:      policy.Outbound,
		Src:            Endpoint{Addr: netip.MustParseAddrPort("[fd77::1:1]:0")},
		Dst:            Endpoint{Addr: netip.MustParseAddrPort("[fd77::2:1]:80")},
		Start:          time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC),
		SecurityPolicy: Plaintext,
		Reason:         ReasonOK,
	}
}

func TestLines(t *testing.T) {
	for name, tt := range map[string]struct {
		line func([]byte, *Connection) []byte
		conn Connection
		want string
	}{
		"JSON": {appendJSON, sample(), `{"time":"2026-03-04T05:06:07.009243Z","level":"info","scope":"access","message":"connection complete","direction":"outbound",` +
			`"src.addr":"10.77.1.10:43210","src.workload":"client","src.namespace":"demo","src.identity":"spiffe://cluster.local/ns/demo/sa/client",` +
			`"dst.addr":"10.77.2.10:8080","dst.workload":"web","dst.namespace":"demo","dst.identity":"spiffe://cluster.local/ns/demo/sa/web",` +
			`"bytes_sent":4096,"bytes_recv":120,"start":"2026-03-04T05:06:07.008009Z","duration_ms":1.234,"connection_security_policy":"mutual_tls",` +
			`"tls.version":"1.3","tls.cipher":"TLS_AES_128_GCM_SHA256","tls.group":"X25519MLKEM768","policy.rule":"default-allow","policy.version":3,"trace":"0af7000000000000000000000000009c","reason":"ok"}` + "\n"},
		"JSON of a refusal": {appendJSON, refused(), `{"time":"2026-03-04T05:06:07.000000Z","level":"error","scope":"access","message":"connection refused","direction":"inbound",` +
			`"src.addr":"10.77.1.10:43210","dst.addr":"[fd77::2:1]:80","bytes_sent":0,"bytes_recv":0,"start":"2026-03-04T05:06:07.000000Z","duration_ms":0.000,` +
			`"connection_security_policy":"unknown","policy.rule":"no-batch","policy.version":0,"reason":"denied","detail":"said \"no\\\"\nand\tleft \u001b[31m\ufffd\u009b\u2028 ü"}` + "\n"},
		"JSON of what passes, of a port that is not known": {appendJSON, passed(), `{"time":"2026-03-04T05:06:07.000000Z","level":"info","scope":"access","message":"connection passed","direction":"outbound",` +
			`"src.addr":"fd77::1:1","dst.addr":"[fd77::2:1]:80","bytes_sent":0,"bytes_recv":0,"start":"2026-03-04T05:06:07.000000Z","duration_ms":0.000,"connection_security_policy":"none","reason":"ok"}` + "\n"},
		"text of what passes": {appendText, passed(), "2026-03-04T05:06:07.000000Z outbound ok fd77::1:1 -> [fd77::2:1]:80 sent=0 received=0 duration=0.000ms none\n"},
		"text": {appendText, sample(), "2026-03-04T05:06:07.009243Z outbound ok 10.77.1.10:43210 (demo/client, spiffe://cluster.local/ns/demo/sa/client) -> " +
			"10.77.2.10:8080 (demo/web, spiffe://cluster.local/ns/demo/sa/web) sent=4096 received=120 duration=1.234ms mutual_tls TLS1.3 TLS_AES_128_GCM_SHA256 X25519MLKEM768 rule=default-allow trace=0af7000000000000000000000000009c\n"},
		"text of a refusal": {appendText, refused(), `2026-03-04T05:06:07.000000Z inbound denied 10.77.1.10:43210 -> [fd77::2:1]:80 sent=0 received=0 duration=0.000ms unknown rule=no-batch ` +
			`detail="said \"no\\\"\nand\tleft \u001b[31m\ufffd\u009b\u2028 ü"` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, string(tt.line(nil, &tt.conn))); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestAZeroConnectionIsStillALine(t *testing.T) {
	b := appendJSON(nil, &Connection{})
	if !json.Valid(b) {
		t.Errorf("not JSON: %s", b)
	}
	if text := string(appendText(nil, &Connection{})); strings.Count(text, "\n") != 1 {
		t.Errorf("not a line: %q", text)
	}
}

func TestALongDetailIsCutAtACharacter(t *testing.T) {
	got := cut(strings.Repeat("x", maxDetail-1) + "üüü")
	if want := strings.Repeat("x", maxDetail-1) + "…"; got != want {
		t.Errorf("got %q", got[maxDetail-4:])
	}
	if got := cut(strings.Repeat("\x80", 2*maxDetail)); len(got) > maxDetail+len("…") {
		t.Errorf("%d bytes of what is no text", len(got))
	}
}

func TestLinesDoNotAllocate(t *testing.T) {
	buf := make([]byte, 0, 4096)
	for name, c := range map[string]Connection{"sample": sample(), "refused": refused()} {
		if n := testing.AllocsPerRun(100, func() { buf = appendJSON(buf[:0], &c) }); n != 0 {
			t.Errorf("%s: %.1f allocations in JSON", name, n)
		}
		if n := testing.AllocsPerRun(100, func() { buf = appendText(buf[:0], &c) }); n != 0 {
			t.Errorf("%s: %.1f allocations in text", name, n)
		}
	}
}

// FuzzDetail: part of a detail may come from a peer.
func FuzzDetail(f *testing.F) {
	f.Add("plain")
	f.Add(refused().Detail)
	f.Fuzz(func(t *testing.T, detail string) {
		c := sample()
		c.Detail = detail
		b := appendJSON(nil, &c)
		var line struct{ Detail string }
		if err := json.Unmarshal(b, &line); err != nil {
			t.Fatalf("%v in %q", err, b)
		}
		if utf8.ValidString(detail) && line.Detail != cut(detail) {
			t.Errorf("%q came back as %q", detail, line.Detail)
		}
		for _, text := range []string{string(b), string(appendText(nil, &c))} {
			for i, r := range text {
				if r < ' ' && i != len(text)-1 || r >= 0x7f && r < 0xa0 {
					t.Errorf("control character %q in %q", r, text)
				}
			}
		}
	})
}

func BenchmarkJSON(b *testing.B) {
	c := sample()
	buf := make([]byte, 0, 4096)
	b.ReportAllocs()
	for b.Loop() {
		buf = appendJSON(buf[:0], &c)
	}
}
