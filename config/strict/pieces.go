// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"bytes"
	"iter"
	"slices"

	"go.yaml.in/yaml/v4"
)

// The tree of a file takes some twenty times its size. A large file of ours is one
// list, and is given to the library in pieces of whole items, so that there is the
// tree of one at a time. What is YAML stays the library's to say: a cut that turns
// out to be none, inside quotation marks, is left out.

// pieceSize is from which size on a file is cut, and about the size of a piece, in
// bytes. The rest of what reading takes is much larger.
const pieceSize = 256 << 10

// pieces is a list that goes on behind what has been parsed.
type pieces struct {
	data   []byte
	list   *yaml.Node // as far as it has been parsed
	column int        // of its dashes
	cuts   []int      // where items begin in data, at the next one of each piece; then its end
	line   int        // how many lines are before the first of cuts
	err    error      // ends the list, and is the file's
}

// cut returns where a file can be cut: each of its lines behind the first item of a
// list is further to the right than that, or another item, or blank, or a comment.
// Then no other key and no second document can follow. Without a cut it is nil.
func cut(data []byte, size int) (cuts []int, column int) {
	if len(data) <= size || bytes.Count(data, []byte("\r")) != bytes.Count(data, []byte("\r\n")) {
		return nil, 0
	}
	at, last := 0, 0
	for line := range bytes.Lines(data) {
		text := bytes.TrimLeft(line, " ")
		indent := len(line) - len(text)
		text = bytes.TrimRight(text, "\r\n")
		item := len(text) > 0 && text[0] == '-' && (len(text) == 1 || text[1] == ' ')
		switch {
		case len(text) == 0, text[0] == '#':
		case column == 0 && text[0] == '%': // a directive, of the whole file
			return nil, 0
		case column == 0:
			if item {
				column = indent + 1
			}
		case indent+1 > column:
		case indent+1 < column, !item:
			return nil, 0
		case at-last >= size:
			cuts, last = append(cuts, at), at
		}
		at += len(line)
	}
	if cuts == nil {
		return nil, 0
	}
	return append(cuts, len(data)), column
}

// begin parses the first piece, up to a list that goes on, or all of data.
func (d *document) begin(data []byte, size int) (*yaml.Node, error) {
	if cuts, column := cut(data, size); cuts != nil {
		first := document{file: d.file}
		root, err := first.parse(data[:cuts[0]])
		if list, ok := lastList(root, column); err == nil && ok {
			d.rest = pieces{data: data, list: list, column: column, cuts: cuts, line: bytes.Count(data[:cuts[0]], []byte("\n"))}
			return root, nil
		}
	}
	return d.parse(data)
}

// lastList returns the last value of a mapping, if it is a list in lines.
func lastList(n *yaml.Node, column int) (*yaml.Node, bool) {
	if kind(n) != "a mapping" || len(n.Content) == 0 {
		return nil, false
	}
	list := n.Content[len(n.Content)-1]
	return list, kind(list) == "a list" && list.Style&yaml.FlowStyle == 0 && list.Column == column
}

// items goes through a list, which may go on behind what has been parsed. In the
// end there may be an error in d.rest.
func (d *document) items(list *yaml.Node) iter.Seq2[int, *yaml.Node] {
	return func(yield func(int, *yaml.Node) bool) {
		part, i := list.Content, 0
		for len(part) > 0 {
			for _, n := range part {
				if !yield(i, n) {
					return
				}
				i++
			}
			part = nil
			if list == d.rest.list {
				part = d.rest.next(d.file)
			}
		}
	}
}

// next parses one more piece, or all that is left if that is no piece by itself. It
// returns nothing at the end.
func (p *pieces) next(file string) []*yaml.Node {
	if len(p.cuts) < 2 || p.err != nil {
		return nil
	}
	list, err := p.parse(file)
	if err != nil && len(p.cuts) > 2 {
		p.cuts = []int{p.cuts[0], len(p.data)}
		list, err = p.parse(file)
	}
	if err != nil {
		p.err = err
		return nil
	}
	p.line += bytes.Count(p.data[p.cuts[0]:p.cuts[1]], []byte("\n"))
	p.cuts = p.cuts[1:]
	return list.Content
}

func (p *pieces) parse(file string) (*yaml.Node, error) {
	key := []byte("_:\n") // the list's, in a line of its own
	d := document{file: file, shift: p.line - 1}
	n, err := d.parse(slices.Concat(key, p.data[p.cuts[0]:p.cuts[1]]))
	if err != nil {
		return nil, err
	}
	list, ok := lastList(n, p.column)
	if !ok || len(n.Content) != 2 {
		return nil, &Error{File: file, Line: p.line + 1, Column: p.column, Problem: "not valid YAML: the list is broken off"}
	}
	return list, nil
}
