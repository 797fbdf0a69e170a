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
			if !seeded(all, target) {
				t.Errorf("%s has no fuzz target %s with seeds", dir, target)
			}
		}
	}
}

// seeded reports whether a source has a fuzz target with seeds.
func seeded(source, target string) bool {
	_, body, ok := strings.Cut(source, "\nfunc "+target+"(f *testing.F) {\n")
	body, _, _ = strings.Cut(body, "\n}\n")
	return ok && strings.Contains(body, "\tf.Add(") && strings.Contains(body, "\tf.Fuzz(")
}

// The oracle: it knows a target that is not there, one without seeds, one that fuzzes
// nothing, and seeds that are another's.
func TestTargetWithoutSeedsIsFound(t *testing.T) {
	const seeds, fuzz = "\tf.Add(\"a\")\n", "\tf.Fuzz(func(t *testing.T, s string) {\n\t})\n"
	target := func(name, body string) string { return "\nfunc " + name + "(f *testing.F) {\n" + body + "}\n" }
	for source, want := range map[string]bool{
		target("FuzzIt", seeds+fuzz):                                true,
		target("FuzzIt", fuzz):                                      false,
		target("FuzzIt", seeds):                                     false,
		target("FuzzIt", fuzz) + target("FuzzOther", seeds+fuzz):    false,
		target("FuzzItAll", seeds+fuzz):                             false,
		"\n// func FuzzIt(f *testing.F) {\n" + seeds + fuzz + "}\n": false,
		"": false,
	} {
		if seeded(source, "FuzzIt") != want {
			t.Errorf("%v: %s", !want, source)
		}
	}
}
