// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"bytes"
	"fmt"
	"unicode/utf8"

	"github.com/goccy/go-yaml/token"
)

// This file refuses what the parser of YAML is not to be given: it calls itself
// for each level of nesting, and 80 kB of brackets would cost it 900 MiB.

const (
	// maxDepth is how deep mappings and lists may be in one another. Ours are
	// five deep at most.
	maxDepth = 32
	// maxMarks is how many anchors, aliases, tags and ? keys are let through to
	// be refused by their keys. None is ever taken.
	maxMarks = 32
)

// byteOrderMark may begin a file (YAML 1.2, 5.2), and says nothing.
const byteOrderMark = "\ufeff"

// text refuses what is no text: YAML 1.2, 5.1 has neither broken UTF-8 nor
// control characters, and they are not seen in an editor.
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
		case r < ' ' && r != '\t' && r != '\n' && r != '\r', r == 0x7f:
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

// bounded refuses nesting without end. Of a file that is no YAML it may count
// too much or too little by some levels, never by many.
func (d *document) bounded(tokens token.Tokens) error {
	flow, marks := 0, 0
	var columns []int // of the block's lists and mappings that the token is in
	for i, t := range tokens {
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow = max(flow-1, 0)
		case token.AnchorType, token.AliasType, token.TagType, token.MappingKeyType:
			marks++
		case token.SequenceEntryType, token.MappingValueType:
			if flow > 0 {
				break
			}
			at := t.Position.Column
			if t.Type == token.MappingValueType && i > 0 { // it begins with its key
				at = tokens[i-1].Position.Column
			}
			for len(columns) > 0 && columns[len(columns)-1] >= at {
				columns = columns[:len(columns)-1]
			}
			columns = append(columns, at)
		}
		switch {
		case flow+len(columns) > maxDepth:
			d.fail(t, "", fmt.Sprintf("%d levels of mappings and lists", maxDepth), "is nested too deep")
			return d.first()
		case marks > maxMarks:
			d.fail(t, "", "plain keys and values", "has too many anchors, aliases or tags")
			return d.first()
		}
	}
	return nil
}
