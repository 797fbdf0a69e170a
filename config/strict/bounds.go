// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"bytes"
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// This file refuses what the parser of YAML is not to be given, or to go on with: it
// calls itself for each level of nesting.

// maxDepth is how deep mappings and lists may be in one another. Ours are five deep
// at most.
const maxDepth = 32

const tooDeep = "is nested too deep"

var depthAllowed = fmt.Sprintf("%d levels of mappings and lists", maxDepth)

// byteOrderMark may begin a file (YAML 1.2, 5.2), and says nothing.
const byteOrderMark = "\ufeff"

// text refuses what is no text: YAML 1.2, 5.1 has neither broken UTF-8 nor
// control characters, and they are not seen in an editor. Of what YAML 1.1 takes for
// the end of a line, only \n and \r are one in an editor too.
func (d *document) text(data []byte) error {
	for i, line, begin := 0, 1, 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		problem, allowed := "", "text in UTF-8"
		switch {
		case r == utf8.RuneError && size <= 1:
			problem = fmt.Sprintf("byte 0x%02x is not UTF-8", data[i])
			if i == 0 && (bytes.HasPrefix(data, []byte{0xff, 0xfe}) || bytes.HasPrefix(data, []byte{0xfe, 0xff})) {
				problem = "is UTF-16"
			}
		case unicode.IsControl(r) && r != '\t' && r != '\n' && r != '\r', r == 0x2028, r == 0x2029, r == 0xfffe, r == 0xffff, r == 0xfeff && i > 0:
			problem, allowed = fmt.Sprintf("has a control character (0x%02x)", r), "text without control characters"
		}
		if problem != "" {
			e := &Error{File: d.file, Line: line, Column: 1 + utf8.RuneCount(data[begin:i]), Problem: problem, Allowed: allowed}
			return e
		}
		i += size
		if r == '\n' {
			line, begin = line+1, i
		}
	}
	return nil
}

// bounds are the library's bounds, by its hooks. An alias stands for nothing there:
// it is refused by its key, whatever it stands for.
type bounds struct{}

// CheckDepth is asked before the library calls itself for one more level. Levels in
// braces and brackets are counted by themselves, so that bounded has to follow.
func (bounds) CheckDepth(depth int, _ *yaml.DepthContext) error {
	if depth > maxDepth {
		return errors.New(tooDeep)
	}
	return nil
}

func (bounds) CheckAlias(int, int) error { return nil }

func (bounds) NewAliasDataContext(yaml.AliasDataServices) (yaml.AliasDataContext, error) {
	return bounds{}, nil
}

func (bounds) BeginDocument() error                  { return nil }
func (bounds) EndDocument() error                    { return nil }
func (bounds) DefineAnchor(string, *yaml.Node) error { return nil }

func (bounds) ResolveAlias(string) (*yaml.Node, bool, error) {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null"}, true, nil
}

// bounded refuses a node at a depth whose levels of both kinds are too many, and
// shifts the lines.
func (d *document) bounded(n *yaml.Node, depth int) error {
	n.Line += d.shift
	if n.Kind == yaml.ScalarNode {
		return nil
	}
	if depth > maxDepth {
		d.fail(n, "", depthAllowed, tooDeep)
		return d.first()
	}
	for _, child := range n.Content {
		if err := d.bounded(child, depth+1); err != nil {
			return err
		}
	}
	return nil
}
