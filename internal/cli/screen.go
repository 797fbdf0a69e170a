// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"strings"

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
		text = clear + fit(text, rows(s.w))
	}
	_, err := io.WriteString(s.w, text)
	return err
}

// fit keeps a text to so many rows, with one left for the cursor; 0: any.
func fit(text string, rows int) string {
	lines := strings.SplitAfter(strings.TrimSuffix(text, "\n"), "\n")
	if rows == 0 || len(lines) < rows {
		return text
	}
	most := max(rows-2, 0)
	return strings.Join(lines[:most], "") + fmt.Sprintf("… and %d lines more\n", len(lines)-most)
}

// rows is the height of the terminal that w is; 0: not known.
func rows(w io.Writer) int {
	var size *unix.Winsize
	if !control(w, func(fd int) (err error) {
		size, err = unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
		return err
	}) {
		return 0
	}
	return int(size.Row)
}
