// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// longList is a file of a list, with the bad item put in the middle.
func longList(items int, bad string) string {
	var b strings.Builder
	b.WriteString("items:\n")
	for i := range items {
		if i == items/2 {
			b.WriteString(bad)
		}
		fmt.Fprintf(&b, "  - name: item-%d\n    text: \"of some length\" # %d\n\n", i, i)
	}
	return b.String()
}

// Of a long list, the tree of the items being read is there and no other: the tree
// of all takes twenty times the file.
func TestReadHoldsOnePiece(t *testing.T) {
	const many = 60_000
	data := []byte(longList(many, ""))
	live := func() int {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	before, most, read := live(), 0, 0
	err := Read("f.yaml", data, func(o *Object) {
		o.Objects("items", func(o *Object) {
			var name, text string
			o.Name("name", &name)
			o.String("text", &text, "text")
			if want := fmt.Sprintf("item-%d", read); name != want || o.Line("") != 2+3*read {
				t.Fatalf("%s in line %d, want %s in line %d", name, o.Line(""), want, 2+3*read)
			}
			if read%(many/10) == 0 {
				most = max(most, live()-before)
			}
			read++
		})
	})
	if err != nil || read != many {
		t.Fatalf("%d items, %v", read, err)
	}
	if t.Logf("%d MiB live, of a file of %d MiB", most>>20, len(data)>>20); most > 4*len(data) {
		t.Errorf("%d bytes are live while a file of %d is read", most, len(data))
	}
}

// A mistake in a piece is where it is in the file.
func TestMistakeInAPiece(t *testing.T) {
	const many = 20_000
	for name, tt := range map[string]struct{ bad, want string }{
		"an unknown key":     {"  - {nam: x}\n", "f.yaml:30002:6: items[10000].nam: unknown key; did you mean name?; allowed: name, text"},
		"no YAML":            {"  - name: a: b\n", "f.yaml:30002:12: not valid YAML: mapping values are not allowed in this context"},
		"a quotation":        {"  - name: 'x\n", "f.yaml:30002:11: not valid YAML: a quotation mark is not closed"},
		"a bracket":          {"  - name: [x\n", "f.yaml:30003:9: not valid YAML: did not find expected ',' or ']'"},
		"a key to the left":  {"items:\n", "f.yaml:30002:1: items: is given twice, first in line 1; allowed: each key once"},
		"a second document":  {"---\nitems:\n", "f.yaml:30003:1: has a second document; allowed: one document, without ---"},
		"an item too far in": {"   - name: x\n", "f.yaml:30002:4: not valid YAML: did not find expected '-' indicator"},
		"an alias":           {"  - *x\n", "f.yaml:30002:5: items[10000]: is an anchor or an alias, which is not taken; allowed: a mapping (key: value)"},
		"too deep":           {"  - " + strings.Repeat("[", 33) + "\n", "f.yaml:30002:37: is nested too deep; allowed: 32 levels of mappings and lists"},
	} {
		t.Run(name, func(t *testing.T) {
			data := longList(many, tt.bad)
			for _, size := range []int{pieceSize, len(data)} {
				if _, err := readPieces(data, size); err == nil || err.Error() != tt.want {
					t.Errorf("in pieces of %d bytes: got  %v\nwant %s", size, err, tt.want)
				}
			}
		})
	}
}
