// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// full is a disk that has so many bytes left.
type full struct {
	left int
	bytes.Buffer
}

func (f *full) Write(p []byte) (int, error) {
	n, _ := f.Buffer.Write(p[:min(len(p), f.left)])
	f.left -= n
	if n < len(p) {
		return n, errors.New("no space left on device")
	}
	return n, nil
}

// A disk that fills up within a line tears no line: there is room again, and it is
// ended. What is written and what is counted agree at each length.
func TestAFullDiskTearsNoLine(t *testing.T) {
	c := sample()
	line := len(appendJSON(nil, &c))
	for left := range 3*line + 1 {
		w := &full{left: left}
		l := lineWriter{writer: w}
		three := appendJSON(appendJSON(appendJSON(nil, &c), &c), &c)
		if err := l.write(three); (err != nil) != (left < len(three)) {
			t.Fatalf("%d bytes are left: %v", left, err)
		}
		w.left = 2
		_ = l.write(three)
		w.left = 10 * line
		_ = l.write(three[:line])
		whole := strings.Repeat(string(three[:line]), int(l.written.Load()))
		if w.String() != whole {
			t.Fatalf("%d bytes are left, %d lines are counted, and written is\n%s", left, l.written.Load(), &w.Buffer)
		}
		if n := l.written.Load() + l.dropped.Load(); n != 7 {
			t.Fatalf("%d bytes are left: %d lines are accounted for, of 7", left, n)
		}
	}
}
