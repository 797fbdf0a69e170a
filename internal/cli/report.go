// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

const (
	ansiReset = "\x1b[0m"
	ansiBold  = "\x1b[1m"
	ansiDim   = "\x1b[2m"
	ansiRed   = "\x1b[31m"
	ansiGreen = "\x1b[32m"
	ansiAmber = "\x1b[33m"
)

// Report prints lines that hold or do not, and counts those that do not. Its methods are not for concurrent use.
type Report struct {
	w      io.Writer
	colour bool
	width  int
	failed []string
	lines  int
}

// NewReport prints to w, with labels padded to width characters.
func NewReport(w io.Writer, width int) *Report {
	return &Report{w: w, colour: colours(w), width: width}
}

// Section prints a heading.
func (r *Report) Section(format string, args ...any) {
	fmt.Fprintf(r.w, "\n%s\n", r.paint(ansiBold, fmt.Sprintf(format, args...)))
}

// Check prints a line with a mark that says whether it holds.
func (r *Report) Check(ok bool, label, format string, args ...any) {
	r.lines++
	mark := r.paint(ansiGreen, "✓")
	value := fmt.Sprintf(format, args...)
	if !ok {
		mark, value = r.paint(ansiRed, "✗"), r.paint(ansiRed, value)
		r.failed = append(r.failed, label)
	}
	fmt.Fprintf(r.w, "  %s %s  %s\n", mark, r.pad(label), value)
}

// Warn prints a line that holds at a cost.
func (r *Report) Warn(label, format string, args ...any) {
	fmt.Fprintf(r.w, "  %s %s  %s\n", r.paint(ansiAmber, "!"), r.pad(label), fmt.Sprintf(format, args...))
}

// More prints a further line of the label before.
func (r *Report) More(format string, args ...any) {
	fmt.Fprintf(r.w, "    %s  %s\n", r.pad(""), fmt.Sprintf(format, args...))
}

// Info prints a line that proves nothing.
func (r *Report) Info(label, format string, args ...any) {
	fmt.Fprintf(r.w, "    %s  %s\n", r.pad(label), r.paint(ansiDim, fmt.Sprintf(format, args...)))
}

// Text prints a line as it is.
func (r *Report) Text(format string, args ...any) { fmt.Fprintf(r.w, format+"\n", args...) }

// Failed returns the labels of the lines that do not hold.
func (r *Report) Failed() []string { return r.failed }

// Lines returns how many lines were checked.
func (r *Report) Lines() int { return r.lines }

func (r *Report) pad(s string) string {
	return s + strings.Repeat(" ", max(0, r.width-utf8.RuneCountInString(s)))
}

func (r *Report) paint(colour, s string) string {
	if !r.colour {
		return s
	}
	return colour + s + ansiReset
}

// Bytes prints a number of bytes in units of 1024.
func Bytes(n int64) string {
	const units = "KMGT"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, u := float64(n)/1024, 0
	for f >= 1024 && u < len(units)-1 {
		f, u = f/1024, u+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[u])
}
