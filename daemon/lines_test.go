// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

func TestLastLinesAreBounded(t *testing.T) {
	var l Lines
	fmt.Fprintln(&l, "first")
	if got := string(l.Last()); got != "first\n" {
		t.Fatalf("kept %q", got)
	}
	const lines = 10000
	for i := range lines {
		fmt.Fprintf(&l, "%d %s\n", i, strings.Repeat("x", 100))
		if len(l.kept) > 2*maxLines {
			t.Fatalf("%d bytes are held", len(l.kept))
		}
	}
	got := l.Last()
	first, _, _ := bytes.Cut(got, []byte(" "))
	if len(got) > maxLines || len(got) < maxLines-200 || !bytes.Contains(got, fmt.Appendf(nil, "\n%d x", lines-1)) || len(first) != len("8800") {
		t.Errorf("%d bytes from line %q on", len(got), first)
	}
}
