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
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
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
}

func (d *document) fail(at *token.Token, key, allowed, problem string) {
	e := &Error{File: d.file, Key: oneLine(key), Problem: oneLine(problem), Allowed: allowed}
	if at != nil && at.Position != nil {
		e.Line, e.Column = at.Position.Line, at.Position.Column
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
func (d *document) refuse(at *token.Token, key, allowed string, err error) {
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
	d := &document{file: file}
	if err := d.text(data); err != nil {
		return err
	}
	tokens := lexer.Tokenize(string(bytes.TrimPrefix(data, []byte(byteOrderMark))))
	if err := d.bounded(tokens); err != nil {
		return err
	}
	// Duplicates are ours to report: the parser's words name no key.
	parsed, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return d.syntax(err)
	}
	var root ast.Node
	for _, doc := range parsed.Docs {
		if doc == nil || doc.Body == nil {
			continue
		}
		if root != nil {
			d.fail(begin(doc.Body), "", "one document, without ---", "has a second document")
			return d.first()
		}
		root = doc.Body
	}
	o := d.object(root, "", nil)
	read(o)
	o.finish()
	return d.first()
}

func (d *document) syntax(err error) error {
	var located interface {
		error
		GetToken() *token.Token
		GetMessage() string
	}
	if errors.As(err, &located) {
		problem, allowed := located.GetMessage(), ""
		switch {
		case strings.Contains(problem, "tab character"), strings.Contains(problem, "'\t'"):
			problem, allowed = "a tab where only spaces may stand", "spaces as indentation"
		case strings.Contains(problem, "sequence end token"):
			problem, allowed = "[ is not closed", "a list from [ to ]"
		case strings.Contains(problem, "mapping end token"), strings.Contains(problem, "could not find flow mapping end"):
			problem, allowed = "{ is not closed", "a mapping from { to }"
		}
		d.fail(located.GetToken(), "", allowed, "not valid YAML: "+problem)
	} else {
		d.fail(nil, "", "", "not valid YAML: "+err.Error())
	}
	return d.first()
}

// begin is where a node begins. A mapping's own token is its first colon.
func begin(n ast.Node) *token.Token {
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 {
		return m.Values[0].Key.GetToken()
	}
	return n.GetToken()
}

// nothing is the kind of a value that is not there, or null.
const nothing = "nothing"

// kind names what stands at n, in words for an operator.
func kind(n ast.Node) string {
	switch n.(type) {
	case nil, *ast.NullNode:
		return nothing
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.StringNode, *ast.LiteralNode:
		return "text"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.BoolNode:
		return "true or false"
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		return "an anchor or an alias, which is not taken"
	case *ast.TagNode:
		return "a tag, which is not taken"
	default:
		return "something else"
	}
}
