// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// shape is a target that uses every kind of value.
type shape struct {
	Text   string
	Yes    bool
	Number int
	Wait   time.Duration
	Kind   string
	Names  []string
	Inner  string
	Items  []string
}

func read(data string) (shape, error) { return readPieces(data, pieceSize) }

func readPieces(data string, size int) (shape, error) {
	s := shape{Text: "default", Number: 7}
	err := readIn("f.yaml", []byte(data), size, func(o *Object) {
		o.String("text", &s.Text, "text")
		o.Bool("yes", &s.Yes)
		o.Int("number", &s.Number, "things", 1, 9)
		o.Duration("wait", &s.Wait, time.Second, time.Hour)
		Enum(o, "kind", &s.Kind, "a", "b")
		List(o, "names", &s.Names, "names", parseName)
		o.Object("inner", func(o *Object) { o.Name("name", &s.Inner) })
		o.Objects("items", func(o *Object) {
			var name, text string
			o.RequireName("name", &name)
			o.String("text", &text, "text")
			s.Items = append(s.Items, name)
		})
	})
	return s, err
}

func TestRead(t *testing.T) {
	for name, tt := range map[string]struct {
		data string
		want shape
	}{
		"nothing":       {"", shape{Text: "default", Number: 7}},
		"comments only": {"# nothing\n", shape{Text: "default", Number: 7}},
		"a document":    {"---\ntext: a\n", shape{Text: "a", Number: 7}},
		"everything": {
			"text: \"5\"\nyes: true\nnumber: 3\nwait: 90s\nkind: b\nnames: [a, b.c]\ninner:\n  name: x\nitems:\n- name: one\n- {name: two}\n",
			shape{"5", true, 3, 90 * time.Second, "b", []string{"a", "b.c"}, "x", []string{"one", "two"}},
		},
		"null objects and lists": {"inner:\nitems:\nnames:\n", shape{Text: "default", Number: 7}},
		"a block of text":        {"text: |\n  one\n  two\n", shape{Text: "one\ntwo\n", Number: 7}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := read(tt.data)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestReadRefuses(t *testing.T) {
	const keys = "inner, items, kind, names, number, text, wait, yes"
	for name, tt := range map[string]struct {
		data string
		want Error
	}{
		"an unknown key":                    {"txt: a\n", Error{Line: 1, Column: 1, Key: "txt", Problem: "unknown key; did you mean text?", Allowed: keys}},
		"two letters swapped":               {"tetx: a\n", Error{Line: 1, Column: 1, Key: "tetx", Problem: "unknown key; did you mean text?", Allowed: keys}},
		"an unknown key inside":             {"items:\n- name: a\n  nme: b\n", Error{Line: 3, Column: 3, Key: "items[0].nme", Problem: "unknown key; did you mean name?", Allowed: "name, text"}},
		"a misspelt needed key":             {"items:\n- {text: b, nam: c}\n", Error{Line: 2, Column: 13, Key: "items[0].nam", Problem: "unknown key; did you mean name?", Allowed: "name, text"}},
		"behind another mistake":            {"number: 10\nitems:\n- {nam: c}\n", Error{Line: 1, Column: 9, Key: "number", Problem: `"10" is not valid`, Allowed: "a whole number of things from 1 to 9"}},
		"a key that is no word":             {"\"a\\nb\": 3\n", Error{Line: 1, Column: 1, Key: `a\nb`, Problem: "unknown key", Allowed: keys}},
		"a key in capitals":                 {"NUMBER: 3\n", Error{Line: 1, Column: 1, Key: "NUMBER", Problem: "unknown key; did you mean number?", Allowed: keys}},
		"a bracket that is open":            {"names: [a\n", Error{Line: 1, Column: 8, Problem: "not valid YAML: [ is not closed", Allowed: "a list from [ to ]"}},
		"a quotation that is open":          {"text: 'a\nyes: true\n", Error{Line: 1, Column: 7, Problem: "not valid YAML: a quotation mark is not closed"}},
		"a line further left":               {" text: a\nyes: true\n", Error{Line: 2, Column: 1, Problem: "not valid YAML: follows a whole mapping or value; is it indented like what it belongs to?"}},
		"a comma that is missing":           {"names: [a, 'b' c]\n", Error{Line: 1, Column: 16, Problem: "not valid YAML: did not find expected ',' or ']'"}},
		"a bracket behind which nothing is": {"names: [\n# c", Error{Line: 1, Column: 8, Problem: "not valid YAML: [ is not closed", Allowed: "a list from [ to ]"}},
		"a brace behind a comma":            {"inner: {name: a,\n\n", Error{Line: 1, Column: 8, Problem: "not valid YAML: { is not closed", Allowed: "a mapping from { to }"}},
		"a brace that is open":              {"inner: {name: a\n", Error{Line: 1, Column: 8, Problem: "not valid YAML: { is not closed", Allowed: "a mapping from { to }"}},
		"the first of two":                  {"zzz: 1\naaa: 1\n", Error{Line: 1, Column: 1, Key: "zzz", Problem: "unknown key", Allowed: keys}},
		"a key twice":                       {"text: a\ntext: b\n", Error{Line: 2, Column: 1, Key: "text", Problem: "is given twice, first in line 1", Allowed: "each key once"}},
		"a number as text":                  {"text: 5\n", Error{Line: 1, Column: 7, Key: "text", Problem: `is a number, to YAML; quote it: "5"`, Allowed: "text"}},
		"text as truth":                     {"yes: maybe\n", Error{Line: 1, Column: 6, Key: "yes", Problem: "is text", Allowed: "true, false"}},
		"a number out of range":             {"number: 10\n", Error{Line: 1, Column: 9, Key: "number", Problem: `"10" is not valid`, Allowed: "a whole number of things from 1 to 9"}},
		"a duration without unit":           {"wait: 10\n", Error{Line: 1, Column: 7, Key: "wait", Problem: `"10" is not valid`, Allowed: "a duration with a unit, from 1s to 1h, such as 10s or 5m"}},
		"an unknown word":                   {"kind: c\n", Error{Line: 1, Column: 7, Key: "kind", Problem: `"c" is not known`, Allowed: "a, b"}},
		"a scalar for a list":               {"names: a\n", Error{Line: 1, Column: 8, Key: "names", Problem: "is text", Allowed: "a list in [ ] of: names"}},
		"a list for a scalar":               {"text: [a]\n", Error{Line: 1, Column: 7, Key: "text", Problem: "is a list", Allowed: "text"}},
		"a list for a mapping":              {"inner: [a]\n", Error{Line: 1, Column: 8, Key: "inner", Problem: "is a list", Allowed: "a mapping (key: value)"}},
		"a mapping in a list":               {"names:\n- a: b\n", Error{Line: 2, Column: 3, Key: "names[0]", Problem: "is a mapping (quote a value that has a colon)", Allowed: "names"}},
		"an empty scalar":                   {"text:\n", Error{Line: 1, Column: 1, Key: "text", Problem: "has no value", Allowed: "text"}},
		"an empty item":                     {"items:\n-\n", Error{Line: 2, Column: 2, Key: "items[0]", Problem: "is empty", Allowed: "a mapping (key: value)"}},
		"a missing key in an item":          {"items:\n- name: a\n- {}\n", Error{Line: 3, Column: 3, Key: "items[1].name", Problem: "is missing", Allowed: nameAllowed}},
		"an anchor":                         {"inner: &a {name: b}\n", Error{Line: 1, Column: 8, Key: "inner", Problem: "is an anchor or an alias, which is not taken", Allowed: "a mapping (key: value)"}},
		"an alias":                          {"inner: *a\n", Error{Line: 1, Column: 8, Key: "inner", Problem: "is an anchor or an alias, which is not taken", Allowed: "a mapping (key: value)"}},
		"a merge":                           {"<<: {}\n", Error{Line: 1, Column: 1, Key: "<<", Problem: "is not a plain key", Allowed: "plain words as keys"}},
		"a tag":                             {"number: !!int 3\n", Error{Line: 1, Column: 9, Key: "number", Problem: "is a tag, which is not taken", Allowed: "a whole number of things from 1 to 9"}},
		"a list at the root":                {"- a\n", Error{Line: 1, Column: 1, Problem: "is a list", Allowed: "a mapping (key: value)"}},
		"two documents":                     {"text: a\n---\ntext: b\n", Error{Line: 3, Column: 1, Problem: "has a second document", Allowed: "one document, without ---"}},
		"no YAML":                           {"a: b: c\n", Error{Line: 1, Column: 5, Problem: "not valid YAML: mapping values are not allowed in this context"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := read(tt.data)
			if _, err2 := readPieces(tt.data, 0); fmt.Sprint(err) != fmt.Sprint(err2) {
				t.Errorf("read in pieces: %v", err2)
			}
			var got *Error
			if !errors.As(err, &got) {
				t.Fatalf("error %v is not an *Error", err)
			}
			tt.want.File = "f.yaml"
			if diff := cmp.Diff(tt.want, *got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestErrorNamesFileLineKeyAndWhatIsAllowed(t *testing.T) {
	_, err := read("text: a\nnumber: 10\n")
	const want = `f.yaml:2:9: number: "10" is not valid; allowed: a whole number of things from 1 to 9`
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestParseName(t *testing.T) {
	long := make([]byte, maxName+1)
	for i := range long {
		long[i] = 'a'
	}
	for _, good := range []string{"a", "web-1", "a.b", "0", string(long[1:])} {
		if _, err := parseName(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", "-a", "a-", "a.", ".a", "a..b", "a.-b", "a-.b", "A", "a_b", "a/b", "..", "a b", "ä", "a\x00", string(long)} {
		if _, err := parseName(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// document writes a shape in one plain form.
func (s shape) document() string {
	quote := func(text string) string { b, _ := json.Marshal(text); return string(b) }
	var b strings.Builder
	fmt.Fprintf(&b, "text: %s\nyes: %v\nnumber: %d\n", quote(s.Text), s.Yes, s.Number)
	if s.Wait != 0 {
		fmt.Fprintf(&b, "wait: %s\n", FormatDuration(s.Wait))
	}
	if s.Kind != "" {
		fmt.Fprintf(&b, "kind: %s\n", s.Kind)
	}
	if s.Inner != "" {
		fmt.Fprintf(&b, "inner: {name: %s}\n", quote(s.Inner))
	}
	for _, l := range []struct {
		key, before, after string
		of                 []string
	}{{"names", "", "", s.Names}, {"items", "{name: ", "}", s.Items}} {
		if l.of == nil {
			continue
		}
		fmt.Fprintf(&b, "%s:\n", l.key)
		for _, one := range l.of {
			fmt.Fprintf(&b, "- %s%s%s\n", l.before, quote(one), l.after)
		}
	}
	return b.String()
}

// Whatever a file holds: a mistake has a place in it and fits into one line of a
// log; what is taken keeps to what is allowed, says the same when it is written
// plainly, and has no room for a key that nobody knows, or for one twice.
func FuzzRead(f *testing.F) {
	for _, seed := range []string{
		"", "text: a\nitems:\n- name: b\n", "a: &b c\n", "names: [a, {b: c}]\n", "? a\n: b\n", "inner: {name: |\n x}",
		"text: \"\\u00e4\\n\"\nyes: true\nnumber: 0x3\nwait: 1m30s\nkind: a\n", "names: [a, 'b', \"c\"]\ninner:\n  name: x\n",
		"number: 03\n", "yes: True\n", "\t : a\n", "wait: 1e3s\n", "text: >-\n  a\n  b\n", "--- # a\ntext: 'it''s'\n...\n", "text: a # b\r\nnumber: 9\r\n",
		"text: a\nitems:\n- name: b\n  text: c\n\n# d\n- name: e\n- {name: f}\n- name: 'g'\n- text: |-\n   h\n  name: i\n",
		"items:\n- name: b\n- name: 'c\n- d'\n- name: e\n", "names:\n  - a\n  - b: c\n  - [d\n  - e\n", "---\nitems:\n-\n  name: a\n- name: b\n- nam: c\n-\n",
	} {
		f.Add(seed)
	}
	fails := func(t *testing.T, data string, err error) {
		t.Helper()
		var located *Error
		if !errors.As(err, &located) {
			t.Fatalf("error %v is not an *Error", err)
		}
		// A carriage return alone ends a line too, to YAML.
		lines := 2 + strings.Count(data, "\n") + strings.Count(data, "\r")
		if located.File != "f.yaml" || located.Problem == "" || located.Line < 0 || located.Line > lines || (located.Line > 0) != (located.Column > 0) {
			t.Errorf("%#v, of %d lines", located, lines)
		}
		if said := err.Error(); strings.ContainsFunc(said, unicode.IsControl) || !utf8.ValidString(said) {
			t.Errorf("an error is no line of text: %q", said)
		}
	}
	f.Fuzz(func(t *testing.T, data string) {
		s, err := read(data)
		if again, err2 := read(data); !cmp.Equal(s, again) || fmt.Sprint(err) != fmt.Sprint(err2) {
			t.Errorf("read again: %v, %v, before %v, %v", again, err2, s, err)
		}
		for size := range 3 {
			if again, err2 := readPieces(data, 20*size); fmt.Sprint(err) != fmt.Sprint(err2) || err == nil && !cmp.Equal(s, again) {
				t.Errorf("read in pieces of %d: %+v, %v, before %+v, %v", 20*size, again, err2, s, err)
			}
		}
		if err != nil {
			fails(t, data, err)
			return
		}
		good := s.Number >= 1 && s.Number <= 9 && (s.Wait == 0 || s.Wait >= time.Second && s.Wait <= time.Hour) && slices.Contains([]string{"", "a", "b"}, s.Kind)
		for _, name := range slices.Concat(s.Names, s.Items) {
			_, err := parseName(name)
			good = good && err == nil
		}
		if _, err := parseName(s.Inner); !good || s.Inner != "" && err != nil {
			t.Errorf("taken: %+v", s)
		}
		if plain, err := read(s.document()); err != nil || !cmp.Equal(s, plain) {
			t.Errorf("written plainly: %v, %+v, was %+v\n%s", err, plain, s, s.document())
		}
		for _, more := range []string{"zzz: 1\n", "number: 1\nnumber: 1\n"} {
			if _, err := read(s.document() + more); err == nil {
				t.Errorf("taken with %q", more)
			} else {
				fails(t, s.document()+more, err)
			}
		}
	})
}

// What would cost the parser more than the file is worth is refused before.
func TestReadIsBounded(t *testing.T) {
	const many = 200_000
	deep := fmt.Sprintf("is nested too deep; allowed: %d levels of mappings and lists", maxDepth)
	for name, tt := range map[string]struct{ data, want string }{
		"lists":           {"items: " + strings.Repeat("[", many), "f.yaml:1:40: " + deep},
		"mappings":        {strings.Repeat("{a: ", many), "f.yaml:1:129: " + deep},
		"lists of a line": {"items:\n" + strings.Repeat("- ", many) + "a\n", "f.yaml:2:65: " + deep},
		"a staircase": {func() string {
			var b strings.Builder
			for i := range 2000 {
				b.WriteString(strings.Repeat(" ", i) + "a:\n")
			}
			return b.String()
		}(), "f.yaml:33:34: " + deep},
		"levels of both kinds": {strings.Repeat("- ", 16) + strings.Repeat("[", 17) + strings.Repeat("]", 17) + "\n", "f.yaml:1:49: " + deep},
		"aliases that grow": {func() string {
			var b strings.Builder
			b.WriteString("a0: &a0 [x]\n")
			for i := range 30 {
				fmt.Fprintf(&b, "a%d: &a%d [%s]\n", i+1, i+1, strings.Repeat(fmt.Sprintf("*a%d, ", i), 100))
			}
			return b.String()
		}(), "f.yaml:1:1: a0: unknown key; allowed: inner, items, kind, names, number, text, wait, yes"},
		"an alias of what it is in": {"items: &a [*a]\n", "f.yaml:1:8: items: is an anchor or an alias, which is not taken; allowed: a list of mappings"},
		"anchors":                   {"items: &a [" + strings.Repeat("&b x, ", many) + "]\n", "f.yaml:1:8: items: is an anchor or an alias, which is not taken; allowed: a list of mappings"},
		"tags":                      {"text: " + strings.Repeat("!!str ", many) + "a\n", "f.yaml:1:13: not valid YAML: did not find expected key"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := read(tt.data); err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
	// A long list is not a deep one.
	if s, err := read("items:\n" + strings.Repeat("- name: a\n", 5000)); err != nil || len(s.Items) != 5000 {
		t.Errorf("%d items, %v", len(s.Items), err)
	}
}

func TestReadTakesTextOnly(t *testing.T) {
	for name, tt := range map[string]struct{ data, want string }{
		"a zero byte":          {"text: a\x00b\n", "f.yaml:1:8: has a control character (0x00); allowed: text without control characters"},
		"an escape":            {"# ä\x1b\n", "f.yaml:1:4: has a control character (0x1b); allowed: text without control characters"},
		"Latin-1":              {"yes: true\ntext: \xe4\n", "f.yaml:2:7: byte 0xe4 is not UTF-8; allowed: text in UTF-8"},
		"a line of YAML 1.1":   {"text: a\u2028yes: true\n", "f.yaml:1:8: has a control character (0x2028); allowed: text without control characters"},
		"a mark inside":        {"text: a\ufeffb\n", "f.yaml:1:8: has a control character (0xfeff); allowed: text without control characters"},
		"UTF-16":               {"\xff\xfet\x00", "f.yaml:1:1: is UTF-16; allowed: text in UTF-8"},
		"a byte order mark":    {"\ufefftext: 5\n", `f.yaml:1:7: text: is a number, to YAML; quote it: "5"; allowed: text`},
		"lines of CR LF":       {"yes: true\r\nnumber: 10\r\n", `f.yaml:2:9: number: "10" is not valid; allowed: a whole number of things from 1 to 9`},
		"a tab as indentation": {"inner:\n\tname: a\n", "f.yaml:2:1: not valid YAML: a tab where only spaces may stand; allowed: spaces as indentation"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := read(tt.data); err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
	for name, data := range map[string]string{
		"a byte order mark": "\ufefftext: b\nnumber: 3\n",
		"lines of CR LF":    "text: b\r\nnumber: 3\r\n",
		"a last tab":        "text: b\t\nnumber: 3\n",
	} {
		if s, err := read(data); err != nil || s.Text != "b" || s.Number != 3 {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
}
