// SPDX-License-Identifier: Apache-2.0

// Package cli prints what a person reads on a terminal: aligned tables, reports of lines that hold or do not, and a
// screen that is drawn again.
//
// Colour is used on terminals only, and never where NO_COLOR is set. It parses no flags and decides nothing.
package cli

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// IsTerminal reports whether w is a terminal.
func IsTerminal(w io.Writer) bool {
	return control(w, func(fd int) error {
		_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		return err
	})
}

// control asks the kernel about the descriptor of w, and reports whether w has one
// and it was answered.
func control(w io.Writer, ask func(fd int) error) bool {
	f, ok := w.(syscall.Conn)
	if !ok {
		return false
	}
	c, err := f.SyscallConn() // Fd would switch the descriptor to blocking mode
	if err != nil {
		return false
	}
	answered := false
	err = c.Control(func(fd uintptr) { answered = ask(int(fd)) == nil })
	return err == nil && answered
}

// colours reports whether w shows colours (https://no-color.org).
func colours(w io.Writer) bool {
	return IsTerminal(w) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// Table is a table with aligned columns. The zero value is an empty table without a header.
type Table struct {
	// Indent stands before each line.
	Indent string
	header []string
	rows   [][]string
	right  map[int]bool
}

// NewTable returns a table with the given header.
func NewTable(header ...string) *Table { return &Table{header: header} }

// AlignRight aligns the given columns (from 0) to the right, as numbers want it.
func (t *Table) AlignRight(columns ...int) *Table {
	if t.right == nil {
		t.right = make(map[int]bool)
	}
	for _, c := range columns {
		t.right[c] = true
	}
	return t
}

// Row adds a row; cells are printed as fmt.Sprint does. What would move a
// terminal's cursor or change its colours is shown as \ufffd: names and reasons may
// be a peer's words.
func (t *Table) Row(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		row[i] = strings.Map(func(r rune) rune {
			if !unicode.IsPrint(r) {
				return unicode.ReplacementChar
			}
			return r
		}, fmt.Sprint(c))
	}
	t.rows = append(t.rows, row)
}

// WriteTo prints the table.
func (t *Table) WriteTo(w io.Writer) (int64, error) {
	rows := t.rows
	if len(t.header) > 0 {
		rows = append([][]string{t.header}, rows...)
	}
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	bold := len(t.header) > 0 && colours(w)
	var b strings.Builder
	for n, row := range rows {
		var line strings.Builder
		line.WriteString(t.Indent)
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if i > 0 {
				line.WriteString("  ")
			}
			if t.right[i] {
				line.WriteString(pad + cell)
			} else {
				line.WriteString(cell + pad)
			}
		}
		text := strings.TrimRight(line.String(), " ")
		if n == 0 && bold {
			text = ansiBold + text + ansiReset
		}
		b.WriteString(text + "\n")
	}
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}
