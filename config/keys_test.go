// SPDX-License-Identifier: Apache-2.0

package config

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"
)

var update = flag.Bool("update", false, "write the table of keys into docs/configuration.md")

const (
	keysPage  = "../docs/configuration.md"
	keysBegin = "<!-- The keys: written from config/config.go by `go test ./config -update`. -->\n"
	keysEnd   = "<!-- End of the keys. -->\n"
)

// The table of the page is that of the struct, its comments and its defaults.
func TestKeysAreDocumented(t *testing.T) {
	want := table(t, documented(t))
	page, err := os.ReadFile(keysPage)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(page), keysBegin)
	got, after, ended := strings.Cut(rest, keysEnd)
	if !ok || !ended {
		t.Fatalf("%s has no place for the keys", keysPage)
	}
	if got == want {
		return
	}
	if *update {
		if err := os.WriteFile(keysPage, []byte(before+keysBegin+want+keysEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("the keys of %s are not those of config.go: run `go test ./config -update` (-want +got)\n%s", keysPage, cmp.Diff(want, got))
}

// The keys that are documented are those of the file, in its order: those that
// `ztunnel config` prints, which the reader reads back (TestYAMLReadsBack).
func TestKeysAreThoseOfTheFile(t *testing.T) {
	var want, got []string
	for _, k := range written(t) {
		want = append(want, k.name)
	}
	for _, k := range documented(t) {
		got = append(got, k.name)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-printed +documented\n%s", diff)
	}
}

// key is one key of the file: its path, and either what is said of it or its
// default.
type key struct{ name, text string }

func table(t *testing.T, keys []key) string {
	var b strings.Builder
	b.WriteString("| key | default | meaning |\n|---|---|---|\n")
	defaults := map[string]string{}
	for _, k := range written(t) {
		defaults[k.name] = k.text
	}
	for _, k := range keys {
		meaning, own, said := strings.Cut(k.text, " Default: ")
		preset := defaults[k.name]
		switch {
		case said && preset != "" && k.name != "node.name":
			t.Errorf("%s says that its default is %q; it is %q, which is written without being told", k.name, own, preset)
		case said:
			preset = own
		case preset == "":
			preset = "none"
		default:
			preset = "`" + preset + "`"
		}
		if meaning == "" || strings.HasSuffix(preset, ".") {
			t.Errorf("%s: the comment is to be its meaning, and a default without a full stop", k.name)
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", k.name, preset, strings.ReplaceAll(strings.TrimSuffix(meaning, "."), "|", `\|`))
	}
	return b.String()
}

// documented reads the keys and their comments from the struct's source.
func documented(t *testing.T) []key {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	structs := map[string]*ast.StructType{}
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.TypeSpec); ok {
			if st, ok := s.Type.(*ast.StructType); ok {
				structs[s.Name.Name] = st
			}
		}
		return true
	})
	var out []key
	var walk func(prefix, of string)
	walk = func(prefix, of string) {
		for _, f := range structs[of].Fields.List {
			for _, n := range f.Names {
				name := prefix + keyOf(n.Name)
				if name == "path" {
					continue // of the file itself
				}
				if id, ok := f.Type.(*ast.Ident); ok && structs[id.Name] != nil {
					walk(name+".", id.Name)
					continue
				}
				out = append(out, key{name, strings.Join(strings.Fields(f.Doc.Text()), " ")})
			}
		}
	}
	walk("", "Config")
	return out
}

// keyOf is a field's name in lower camel case: CIDRs is cidrs, LeafTTL leafTTL.
func keyOf(field string) string {
	r := []rune(field)
	upper := 0
	for upper < len(r) && unicode.IsUpper(r[upper]) {
		upper++
	}
	if upper > 1 && upper < len(r) && field != "CIDRs" {
		upper-- // of the next word
	}
	return strings.ToLower(string(r[:upper])) + string(r[upper:])
}

// written are the keys of the file that holds the defaults.
func written(t *testing.T) []key {
	t.Helper()
	c := Default(".")
	data, err := c.YAML()
	if err != nil {
		t.Fatal(err)
	}
	var top yaml.Node
	if err := yaml.Load(data, &top); err != nil {
		t.Fatal(err)
	}
	var out []key
	var walk func(prefix string, m *yaml.Node)
	walk = func(prefix string, m *yaml.Node) {
		for i := 0; i < len(m.Content); i += 2 {
			name, v := prefix+m.Content[i].Value, m.Content[i+1]
			switch v.Kind {
			case yaml.MappingNode:
				walk(name+".", v)
			case yaml.SequenceNode:
				if len(v.Content) > 0 {
					t.Fatalf("%s is a list that is not empty: write down how its default is printed", name)
				}
				out = append(out, key{name, ""})
			default:
				out = append(out, key{name, v.Value})
			}
		}
	}
	walk("", top.Content[0])
	return out
}
