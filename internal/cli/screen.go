// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Screen shows one text in place of the one before: on a terminal from its top
// left corner, cut at its height; elsewhere one after the other.
type Screen struct {
	w   io.Writer
	tty bool
}

// NewScreen shows on w.
func NewScreen(w io.Writer) *Screen { return &Screen{w, IsTerminal(w)} }

// IsTerminal reports whether it is one.
func (s *Screen) IsTerminal() bool { return s.tty }

// Show shows a text of whole lines.
func (s *Screen) Show(text string) error {
	if s.tty {
		const clear = "\x1b[H\x1b[J" // cursor to the top, erase to the end (ECMA-48 8.3.21, 8.3.39)
		rows, columns := size(s.w)
		text = clear + fit(text, rows, columns)
	}
	_, err := io.WriteString(s.w, text)
	return err
}

// fit keeps a text to so many rows of so many columns, with one row left for the
// cursor; 0 rows: any. A line that is longer than a row takes as many as it needs.
func fit(text string, rows, columns int) string {
	if rows == 0 {
		return text
	}
	lines := strings.SplitAfter(strings.TrimSuffix(text, "\n"), "\n")
	used, most := 0, 0 // most: the lines that leave a row for the number of the others
	for i, line := range lines {
		used += height(line, columns)
		if used <= rows-2 {
			most = i + 1
		}
	}
	if used < rows {
		return text
	}
	return strings.Join(lines[:most], "") + fmt.Sprintf("… and %d lines more\n", len(lines)-most)
}

// height is how many rows a line takes; 0 columns: not known.
func height(line string, columns int) int {
	if columns == 0 {
		return 1
	}
	return max(1, (utf8.RuneCountInString(strings.TrimSuffix(line, "\n"))+columns-1)/columns)
}

// size is that of the terminal that w is; 0: not known.
func size(w io.Writer) (rows, columns int) {
	control(w, func(fd int) error {
		s, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
		if err == nil {
			rows, columns = int(s.Row), int(s.Col)
		}
		return err
	})
	return rows, columns
}
