// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// Object is one mapping. Its methods leave their target alone when the key is
// absent, so that a caller fills in defaults first, or when it is wrong.
type Object struct {
	doc    *document
	path   string       // with a trailing dot, empty at the root
	at     *token.Token // where the object begins
	fields map[string]*ast.MappingValueNode
	known  []string
}

// object makes an Object of a node; anything but a mapping or nothing is a mistake.
func (d *document) object(n ast.Node, path string, at *token.Token) *Object {
	o := &Object{doc: d, path: path, at: at, fields: map[string]*ast.MappingValueNode{}}
	var values []*ast.MappingValueNode
	switch n := n.(type) {
	case nil, *ast.NullNode:
		return o
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	default:
		d.fail(begin(n), strings.TrimSuffix(path, "."), "a mapping (key: value)", "is "+kind(n))
		return o
	}
	for i, v := range values {
		at := v.Key.GetToken()
		if i == 0 {
			o.at = at
		}
		name, ok := v.Key.(*ast.StringNode)
		switch {
		case !ok:
			d.fail(at, path+at.Value, "plain words as keys", "is not a plain key")
		case o.fields[name.Value] != nil:
			line := o.fields[name.Value].Key.GetToken().Position.Line
			d.fail(at, path+name.Value, "each key once", fmt.Sprintf("is given twice, first in line %d", line))
		default:
			o.fields[name.Value] = v
		}
	}
	return o
}

// take returns the value of a key and marks the key as known. ok is false when
// the key is absent.
func (o *Object) take(name string) (ast.Node, bool) {
	o.known = append(o.known, name)
	v, ok := o.fields[name]
	if !ok {
		return nil, false
	}
	return v.Value, true
}

// finish reports every key that was not asked for. What else was said of the
// object's own keys is then left out: a misspelt key makes another one missing, and
// a mapping another one than was meant.
func (o *Object) finish() {
	known := slices.Clone(o.known)
	slices.Sort(known)
	known = slices.Compact(known)
	left := slices.DeleteFunc(slices.Sorted(maps.Keys(o.fields)), func(name string) bool { return slices.Contains(known, name) })
	if len(left) == 0 {
		return
	}
	o.doc.errors = slices.DeleteFunc(o.doc.errors, func(e *Error) bool {
		name, of := strings.CutPrefix(e.Key, o.path)
		return of && slices.Contains(known, name)
	})
	for _, name := range left {
		problem := "unknown key"
		if meant := nearest(name, known); meant != "" && len(known) > 1 {
			problem += "; did you mean " + meant + "?"
		}
		o.doc.fail(o.fields[name].Key.GetToken(), o.path+name, strings.Join(known, ", "), problem)
	}
}

// nearest returns the word that a misspelt one may be meant to be; empty: each
// differs in a third of its letters or more.
func nearest(name string, words []string) (found string) {
	if len(name) > maxMisspelt {
		return ""
	}
	least := maxMisspelt
	for _, w := range words {
		d := distance(strings.ToLower(name), strings.ToLower(w))
		if d < least && 3*d < max(len(name), len(w)) {
			found, least = w, d
		}
	}
	return found
}

// maxMisspelt bounds what is compared: no key of ours is as long, in bytes.
const maxMisspelt = 32

// distance counts the letters to add, take away, replace, or swap with the next
// one, after Damerau and Levenshtein.
func distance(a, b string) int {
	above, row, next := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next[0] = i + 1
		for j := range len(b) {
			change := row[j]
			if a[i] != b[j] {
				change++
			}
			next[j+1] = min(change, next[j]+1, row[j+1]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				next[j+1] = min(next[j+1], above[j-1]+1)
			}
		}
		above, row, next = row, next, above
	}
	return row[len(b)]
}

// Has says whether the key is there.
func (o *Object) Has(name string) bool {
	_, ok := o.fields[name]
	return ok
}

// Line is the line of a key, or of the object when the key is absent. From 1; 0
// for an empty file.
func (o *Object) Line(name string) int {
	at := o.token(name)
	if at == nil || at.Position == nil {
		return 0
	}
	return at.Position.Line
}

func (o *Object) token(name string) *token.Token {
	if v, ok := o.fields[name]; ok {
		if k := kind(v.Value); k != "a mapping" && k != nothing {
			return begin(v.Value)
		}
		return v.Key.GetToken()
	}
	return o.at
}

// Fail reports a mistake at a key, or at the object when the key is absent.
func (o *Object) Fail(name, allowed, format string, args ...any) {
	o.doc.fail(o.token(name), o.path+name, allowed, fmt.Sprintf(format, args...))
}

// Require reports a key that is absent.
func (o *Object) Require(name, allowed string) {
	if !o.Has(name) {
		o.Fail(name, allowed, "is missing")
	}
}

// RequireList reports a list that is absent or empty.
func (o *Object) RequireList(name, allowed string) {
	v, ok := o.fields[name]
	if !ok {
		o.Fail(name, allowed, "is missing")
		return
	}
	if seq, ok := v.Value.(*ast.SequenceNode); kind(v.Value) == nothing || ok && len(seq.Values) == 0 {
		o.Fail(name, allowed, "is empty")
	}
}

// Object reads the mapping of a key. read is also called when the key is
// absent, with an empty Object, so that required keys inside it are missed.
func (o *Object) Object(name string, read func(*Object)) {
	n, _ := o.take(name)
	at := o.at
	if v, ok := o.fields[name]; ok {
		at = v.Key.GetToken()
	}
	child := o.doc.object(n, o.path+name+".", at)
	read(child)
	child.finish()
}

// Objects reads a list of mappings.
func (o *Object) Objects(name string, read func(*Object)) {
	for i, n := range o.sequence(name, "a list of mappings") {
		path := o.path + name + "[" + strconv.Itoa(i) + "]."
		if kind(n) == nothing {
			o.doc.fail(begin(n), strings.TrimSuffix(path, "."), "a mapping (key: value)", "is empty")
			continue
		}
		child := o.doc.object(n, path, begin(n))
		read(child)
		child.finish()
	}
}

func (o *Object) sequence(name, allowed string) []ast.Node {
	n, ok := o.take(name)
	if !ok || kind(n) == nothing {
		return nil
	}
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		o.Fail(name, allowed, "is %s", kind(n))
		return nil
	}
	return seq.Values
}

// String reads text. A number or a truth value must be quoted.
func (o *Object) String(name string, dst *string, allowed string) {
	n, ok := o.take(name)
	if !ok {
		return
	}
	switch n := n.(type) {
	case *ast.StringNode:
		*dst = n.Value
	case *ast.LiteralNode:
		*dst = n.Value.Value
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		o.Fail(name, allowed, "is %s, to YAML; quote it: %q", kind(n), n.GetToken().Value)
	default:
		o.Fail(name, allowed, "%s", notScalar(n))
	}
}

// Bool reads true or false.
func (o *Object) Bool(name string, dst *bool) {
	n, ok := o.take(name)
	if !ok {
		return
	}
	b, ok := n.(*ast.BoolNode)
	if !ok {
		o.Fail(name, "true, false", "is %s", kind(n))
		return
	}
	*dst = b.Value
}

// Int reads a whole number, of something, from least to most.
func (o *Object) Int(name string, dst *int, of string, least, most int) {
	allowed := fmt.Sprintf("a whole number of %s from %d to %d", of, least, most)
	Scalar(o, name, dst, allowed, func(text string) (int, error) {
		v, err := strconv.Atoi(text)
		if err != nil || v < least || v > most {
			return 0, fmt.Errorf("%q is not valid", text)
		}
		return v, nil
	})
}

// Duration reads a duration with a unit, such as 10s, from least to most.
func (o *Object) Duration(name string, dst *time.Duration, least, most time.Duration) {
	allowed := fmt.Sprintf("a duration with a unit, from %s to %s, such as 10s or 5m", FormatDuration(least), FormatDuration(most))
	Scalar(o, name, dst, allowed, func(text string) (time.Duration, error) {
		v, err := time.ParseDuration(text)
		if err != nil || v < least || v > most {
			return 0, fmt.Errorf("%q is not valid", text)
		}
		return v, nil
	})
}

// FormatDuration writes 24h rather than 24h0m0s.
func FormatDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// scalar returns the text of a scalar as the file has it, whatever YAML takes
// it for: an address or a serial number may look like a number.
func scalar(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	default:
		return "", false
	}
}

// notScalar says what stands where a single value belongs. The parser takes an
// IPv6 address in a list inside { } for a mapping.
func notScalar(n ast.Node) string {
	switch k := kind(n); k {
	case "a mapping":
		return "is a mapping (quote a value that has a colon)"
	case nothing:
		return "has no value"
	default:
		return "is " + k
	}
}

// Scalar reads a single value by parse, whose error says what is wrong with it.
func Scalar[T any](o *Object, name string, dst *T, allowed string, parse func(string) (T, error)) {
	n, ok := o.take(name)
	if !ok {
		return
	}
	text, ok := scalar(n)
	if !ok {
		o.Fail(name, allowed, "%s", notScalar(n))
		return
	}
	v, err := parse(text)
	if err != nil {
		o.doc.refuse(o.token(name), o.path+name, allowed, err)
		return
	}
	*dst = v
}

// List reads a list of single values by parse. A list that is empty or null
// makes dst nil.
func List[T any](o *Object, name string, dst *[]T, allowed string, parse func(string) (T, error)) {
	if !o.Has(name) {
		o.take(name)
		return
	}
	var list []T
	for i, n := range o.sequence(name, "a list in [ ] of: "+allowed) {
		key := o.path + name + "[" + strconv.Itoa(i) + "]"
		text, ok := scalar(n)
		if !ok {
			o.doc.fail(begin(n), key, allowed, notScalar(n))
			continue
		}
		v, err := parse(text)
		if err != nil {
			o.doc.refuse(begin(n), key, allowed, err)
			continue
		}
		list = append(list, v)
	}
	*dst = list
}

// Enum reads one of the words allowed.
func Enum[T ~string](o *Object, name string, dst *T, words ...T) {
	list := make([]string, len(words))
	for i, w := range words {
		list[i] = string(w)
	}
	Scalar(o, name, dst, strings.Join(list, ", "), func(text string) (T, error) {
		if !slices.Contains(list, text) {
			return "", fmt.Errorf("%q is not known", text)
		}
		return T(text), nil
	})
}

// Map reads a mapping from single values to single values, one or more.
func Map[K comparable, V any](o *Object, name string, dst *map[K]V, keys string, key func(string) (K, error), values string, value func(string) (V, error)) {
	n, ok := o.take(name)
	if !ok {
		return
	}
	var fields []*ast.MappingValueNode
	switch n := n.(type) {
	case *ast.MappingNode:
		fields = n.Values
	case *ast.MappingValueNode:
		fields = []*ast.MappingValueNode{n}
	}
	if len(fields) == 0 {
		problem := "is " + kind(n)
		if k := kind(n); k == nothing || k == "a mapping" {
			problem = "is empty"
		}
		o.Fail(name, "a mapping, each key "+keys+", each value one of "+values, "%s", problem)
		return
	}
	out := map[K]V{}
	lines := map[K]int{}
	for _, f := range fields {
		at := f.Key.GetToken()
		path := o.path + name + "." + at.Value
		k, err := key(at.Value)
		if err != nil {
			o.doc.fail(at, path, keys, err.Error())
			continue
		}
		if line, twice := lines[k]; twice {
			o.doc.fail(at, path, "each key once", fmt.Sprintf("is given twice, first in line %d", line))
			continue
		}
		lines[k] = at.Position.Line
		text, ok := scalar(f.Value)
		if !ok {
			o.doc.fail(begin(f.Value), path, values, notScalar(f.Value))
			continue
		}
		if out[k], err = value(text); err != nil {
			o.doc.fail(begin(f.Value), path, values, err.Error())
		}
	}
	*dst = out
}
