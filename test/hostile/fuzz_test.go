// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEveryParserIsFuzzed: what takes a peer's bytes has a fuzz target, with seeds.
func TestEveryParserIsFuzzed(t *testing.T) {
	parsers := map[string][]string{
		"tunnel/record":    {"FuzzOpen", "FuzzPeer"},
		"tunnel/handshake": {"FuzzConn", "FuzzServer", "FuzzRecords"}, // the last two against crypto/tls
		"tunnel/h2":        {"FuzzReceive", "FuzzFramer"},             // the second against x/net/http2, HPACK included
		"tunnel/session":   {"FuzzSession"},                           // all of it, with take-overs
		"tunnel/hbone":     {"FuzzParseRequest", "FuzzParseResponse"}, // with baggage, forwarded and traceparent
		"identity":         {"FuzzVerify"},                            // certificates
	}
	for dir, targets := range parsers {
		files, err := filepath.Glob(filepath.Join("..", "..", dir, "*_test.go"))
		if err != nil || len(files) == 0 {
			t.Errorf("%s: no tests, %v", dir, err)
		}
		all := ""
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			all += string(b)
		}
		for _, target := range targets {
			_, body, ok := strings.Cut(all, "func "+target+"(f *testing.F) {")
			if body, _, _ = strings.Cut(body, "\n}\n"); !ok || !strings.Contains(body, "f.Add(") {
				t.Errorf("%s has no fuzz target %s with seeds", dir, target)
			}
		}
		if strings.Contains(all, "func FuzzNothing(") { // the control: it is not found everywhere
			t.Errorf("%s has a target of this name", dir)
		}
	}
}
