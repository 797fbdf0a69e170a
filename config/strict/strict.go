// SPDX-License-Identifier: Apache-2.0

// Package strict reads the YAML files of an operator and is particular about
// them: an unknown key, a key given twice, a value of the wrong kind, an anchor
// or a second document is an error that names the file, the line, the key, and
// what would have been allowed. A reader asks an Object for the keys it knows;
// what nobody asked for is unknown, so that no list of keys is kept twice.
//
// Of several mistakes the first one in the file is reported, but a mapping's
// unknown key before the other mistakes at its keys, which may follow from it. The package opens
// no files and keeps nothing.
package strict

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v4"
)

// Error is one mistake in a file.
type Error struct {
	File    string
	Line    int    // from 1; 0 when the mistake has no place
	Column  int    // from 1
	Key     string // such as tunnel.idle or pods[2].netns; empty for a syntax error
	Problem string
	Allowed string // what would have been right; empty when Problem says it
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", e.Line, e.Column)
	}
	b.WriteString(": ")
	if e.Key != "" {
		b.WriteString(e.Key)
		b.WriteString(": ")
	}
	b.WriteString(e.Problem)
	if e.Allowed != "" {
		b.WriteString("; allowed: ")
		b.WriteString(e.Allowed)
	}
	return b.String()
}

// document gathers the mistakes of one file.
type document struct {
	file   string
	errors []*Error
	shift  int    // of the lines that the library counts
	rest   pieces // of the file's list, where it is long
}

func (d *document) fail(at *yaml.Node, key, allowed, problem string) {
	e := &Error{File: d.file, Key: oneLine(key), Problem: oneLine(problem), Allowed: allowed}
	if at != nil {
		e.Line, e.Column = at.Line, at.Column
	}
	d.errors = append(d.errors, e)
}

// oneLine escapes what would end a line, or move the cursor of who reads it.
func oneLine(text string) string {
	if !strings.ContainsFunc(text, unicode.IsControl) {
		return text
	}
	quoted := strconv.Quote(text)
	return quoted[1 : len(quoted)-1]
}

// Unfit is the error of a parser of values for one that is right by itself and does
// not fit here: Allowed takes the place of what is right by itself.
type Unfit struct{ Problem, Allowed string }

func (u *Unfit) Error() string { return u.Problem }

// refuse reports a value that its parser refuses.
func (d *document) refuse(at *yaml.Node, key, allowed string, err error) {
	var unfit *Unfit
	if errors.As(err, &unfit) {
		allowed = unfit.Allowed
	}
	d.fail(at, key, allowed, err.Error())
}

// first returns the mistake that stands first in the file.
func (d *document) first() error {
	if len(d.errors) == 0 {
		return nil
	}
	return slices.MinFunc(d.errors, func(a, b *Error) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
}

// Read parses data, which must be one YAML mapping or nothing at all, and calls
// read with it. file is only used in errors, each of which is an *Error.
func Read(file string, data []byte, read func(*Object)) error {
	return readIn(file, data, pieceSize, read)
}

func readIn(file string, data []byte, size int, read func(*Object)) error {
	d := &document{file: file}
	if err := d.text(data); err != nil {
		return err
	}
	root, err := d.begin(bytes.TrimPrefix(data, []byte(byteOrderMark)), size)
	if err != nil {
		return err
	}
	o := d.object(root, "", nil)
	read(o)
	o.finish()
	for len(d.rest.next(file)) > 0 { // of a list that nobody asked for
	}
	if d.rest.err != nil { // that it is no YAML goes before what it says
		return d.rest.err
	}
	return d.first()
}

// parse returns the one document's content, nil where there is none.
func (d *document) parse(data []byte) (*yaml.Node, error) {
	// Duplicates are ours to report: the library's words name no key.
	l, err := yaml.NewLoader(bytes.NewReader(data), yaml.WithUniqueKeys(false), yaml.WithPlugin(bounds{}))
	if err != nil {
		return nil, fmt.Errorf("make a YAML loader: %w", err)
	}
	var root *yaml.Node
	for {
		var doc yaml.Node
		if err := l.Load(&doc); errors.Is(err, io.EOF) {
			return root, nil
		} else if err != nil {
			return nil, d.syntax(data, err)
		}
		for _, n := range doc.Content {
			if n.Kind == yaml.ScalarNode && n.Value == "" && kind(n) == nothing {
				continue
			}
			if err := d.bounded(n, 1); err != nil {
				return nil, err
			}
			if root != nil {
				d.fail(n, "", "one document, without ---", "has a second document")
				return nil, d.first()
			}
			root = n
		}
	}
}

// oneMore is an item of a list, or a key, behind whatever a file ends with.
var oneMore = []byte("\n x")

// syntax puts what the library says of data into the words of this package.
func (d *document) syntax(data []byte, err error) error {
	var located *yaml.LoadError
	if !errors.As(err, &located) {
		d.fail(nil, "", "", "not valid YAML: "+err.Error())
		return d.first()
	}
	at, problem, allowed := located.Mark, located.Message, ""
	atEnd := at.Index >= len(bytes.TrimSpace(data))
	switch {
	case problem == tooDeep:
		allowed = depthAllowed
	case strings.Contains(problem, " tab "), at.Index < len(data) && data[at.Index] == '\t':
		problem, allowed = "not valid YAML: a tab where only spaces may stand", "spaces as indentation"
	case atEnd && located.ContextMsg == "while parsing a flow sequence":
		at, problem, allowed = located.ContextMark, "not valid YAML: [ is not closed", "a list from [ to ]"
	case atEnd && located.ContextMsg == "while parsing a flow mapping":
		at, problem, allowed = located.ContextMark, "not valid YAML: { is not closed", "a mapping from { to }"
	case atEnd && located.ContextMsg == "while parsing a flow node" && !bytes.HasSuffix(data, oneMore):
		// It waits for an item. Behind one, the error is where the bracket is.
		_, err := d.parse(slices.Concat(data, oneMore))
		return err
	case atEnd && located.ContextMsg == "while scanning a quoted scalar":
		at, problem = located.ContextMark, "not valid YAML: a quotation mark is not closed"
	case strings.HasSuffix(problem, "<document start>"):
		problem = "not valid YAML: follows a whole mapping or value; is it indented like what it belongs to?"
	default:
		problem = "not valid YAML: " + problem
	}
	d.fail(&yaml.Node{Line: at.Line + d.shift, Column: at.Column}, "", allowed, problem)
	return d.first()
}

// nothing is the kind of a value that is not there, or null.
const nothing = "nothing"

// kind names what stands at n, in words for an operator.
func kind(n *yaml.Node) string {
	switch {
	case n == nil:
		return nothing
	case n.Kind == yaml.AliasNode, n.Anchor != "":
		return "an anchor or an alias, which is not taken"
	case n.Style&yaml.TaggedStyle != 0, n.Tag == "!":
		return "a tag, which is not taken"
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	}
	switch n.Tag {
	case "!!null":
		return nothing
	case "!!bool":
		return "true or false"
	case "!!int", "!!float":
		return "a number"
	default: // a point in time is text to us
		return "text"
	}
}
