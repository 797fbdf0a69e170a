// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// Object is one mapping. Its methods leave their target alone when the key is
// absent, so that a caller fills in defaults first, or when it is wrong.
type Object struct {
	doc    *document
	path   string     // with a trailing dot, empty at the root
	at     *yaml.Node // where the object begins
	since  int        // how many mistakes are older than the object
	fields map[string]field
	known  []string
}

type field struct{ key, value *yaml.Node }

// object makes an Object of a node; anything but a mapping or nothing is a mistake.
func (d *document) object(n *yaml.Node, path string, at *yaml.Node) *Object {
	o := &Object{doc: d, path: path, at: at, since: len(d.errors)}
	switch k := kind(n); k {
	case nothing:
		return o
	case "a mapping":
	default:
		d.fail(n, strings.TrimSuffix(path, "."), "a mapping (key: value)", "is "+k)
		return o
	}
	o.fields = make(map[string]field, len(n.Content)/2)
	for key, value := range pairs(n) {
		if len(o.fields) == 0 {
			o.at = key
		}
		first, twice := o.fields[key.Value]
		switch {
		case kind(key) != "text" || key.Tag == "!!merge":
			d.fail(key, path+key.Value, "plain words as keys", "is not a plain key")
		case twice:
			d.fail(key, path+key.Value, "each key once", fmt.Sprintf("is given twice, first in line %d", first.key.Line))
		default:
			o.fields[key.Value] = field{key, value}
		}
	}
	return o
}

// pairs are the keys and the values of a mapping.
func pairs(n *yaml.Node) iter.Seq2[*yaml.Node, *yaml.Node] {
	return func(yield func(key, value *yaml.Node) bool) {
		for i := 0; i+1 < len(n.Content); i += 2 {
			if !yield(n.Content[i], n.Content[i+1]) {
				return
			}
		}
	}
}

// take returns the value of a key and marks the key as known. ok is false when
// the key is absent.
func (o *Object) take(name string) (*yaml.Node, bool) {
	o.known = append(o.known, name)
	v, ok := o.fields[name]
	if !ok {
		return nil, false
	}
	return v.value, true
}

// finish reports every key that was not asked for. What else was said of the
// object's own keys is then left out: a misspelt key makes another one missing, and
// a mapping another one than was meant.
func (o *Object) finish() {
	var left []string
	for name := range o.fields {
		if !slices.Contains(o.known, name) {
			left = append(left, name)
		}
	}
	if left == nil {
		return
	}
	slices.Sort(left)
	known := slices.Clone(o.known)
	slices.Sort(known)
	known = slices.Compact(known)
	own := slices.DeleteFunc(o.doc.errors[o.since:], func(e *Error) bool {
		name, of := strings.CutPrefix(e.Key, o.path)
		return of && slices.Contains(known, name)
	})
	o.doc.errors = o.doc.errors[:o.since+len(own)]
	for _, name := range left {
		problem := "unknown key"
		if meant := nearest(name, known); meant != "" && len(known) > 1 {
			problem += "; did you mean " + meant + "?"
		}
		o.doc.fail(o.fields[name].key, o.path+name, strings.Join(known, ", "), problem)
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
	at := o.place(name)
	if at == nil {
		return 0
	}
	return at.Line
}

// place is where a key's value begins; the key where that is a mapping or nothing,
// and the object where it is absent.
func (o *Object) place(name string) *yaml.Node {
	v, ok := o.fields[name]
	if !ok {
		return o.at
	}
	if k := kind(v.value); k == "a mapping" || k == nothing {
		return v.key
	}
	return v.value
}

// Fail reports a mistake at a key, or at the object when the key is absent.
func (o *Object) Fail(name, allowed, format string, args ...any) {
	o.doc.fail(o.place(name), o.path+name, allowed, fmt.Sprintf(format, args...))
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
	if k := kind(v.value); k == nothing || k == "a list" && len(v.value.Content) == 0 {
		o.Fail(name, allowed, "is empty")
	}
}

// Object reads the mapping of a key. read is also called when the key is
// absent, with an empty Object, so that required keys inside it are missed.
func (o *Object) Object(name string, read func(*Object)) {
	n, _ := o.take(name)
	at := o.at
	if v, ok := o.fields[name]; ok {
		at = v.key
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
			o.doc.fail(n, strings.TrimSuffix(path, "."), "a mapping (key: value)", "is empty")
			continue
		}
		child := o.doc.object(n, path, n)
		read(child)
		child.finish()
	}
}

func (o *Object) sequence(name, allowed string) iter.Seq2[int, *yaml.Node] {
	none := func(func(int, *yaml.Node) bool) {}
	n, ok := o.take(name)
	if !ok || kind(n) == nothing {
		return none
	}
	if k := kind(n); k != "a list" {
		o.Fail(name, allowed, "is %s", k)
		return none
	}
	return o.doc.items(n)
}

// String reads text. A number or a truth value must be quoted.
func (o *Object) String(name string, dst *string, allowed string) {
	n, ok := o.take(name)
	if !ok {
		return
	}
	switch text, ok := scalar(n); {
	case !ok:
		o.Fail(name, allowed, "%s", notScalar(n))
	case kind(n) != "text":
		o.Fail(name, allowed, "is %s, to YAML; quote it: %q", kind(n), text)
	default:
		*dst = text
	}
}

// Bool reads true or false.
func (o *Object) Bool(name string, dst *bool) {
	n, ok := o.take(name)
	if !ok {
		return
	}
	if k := kind(n); k != "true or false" {
		o.Fail(name, "true, false", "is %s", k)
		return
	}
	*dst = strings.EqualFold(n.Value, "true")
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
func scalar(n *yaml.Node) (string, bool) {
	switch kind(n) {
	case "text", "a number", "true or false":
		return n.Value, true
	default:
		return "", false
	}
}

// notScalar says what stands where a single value belongs. The parser takes an
// IPv6 address in a list inside { } for a mapping.
func notScalar(n *yaml.Node) string {
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
		o.doc.refuse(o.place(name), o.path+name, allowed, err)
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
			o.doc.fail(n, key, allowed, notScalar(n))
			continue
		}
		v, err := parse(text)
		if err != nil {
			o.doc.refuse(n, key, allowed, err)
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
	if k := kind(n); k != "a mapping" || len(n.Content) == 0 {
		problem := "is " + k
		if k == nothing || k == "a mapping" {
			problem = "is empty"
		}
		o.Fail(name, "a mapping, each key "+keys+", each value one of "+values, "%s", problem)
		return
	}
	out := map[K]V{}
	lines := map[K]int{}
	for at, v := range pairs(n) {
		path := o.path + name + "." + at.Value
		word, ok := scalar(at)
		if !ok {
			o.doc.fail(at, path, keys, notScalar(at))
			continue
		}
		k, err := key(word)
		if err != nil {
			o.doc.fail(at, path, keys, err.Error())
			continue
		}
		if line, twice := lines[k]; twice {
			o.doc.fail(at, path, "each key once", fmt.Sprintf("is given twice, first in line %d", line))
			continue
		}
		lines[k] = at.Line
		text, ok := scalar(v)
		if !ok {
			o.doc.fail(v, path, values, notScalar(v))
			continue
		}
		if out[k], err = value(text); err != nil {
			o.doc.fail(v, path, values, err.Error())
		}
	}
	*dst = out
}
