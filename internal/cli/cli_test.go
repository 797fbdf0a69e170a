// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTableAligns(t *testing.T) {
	table := NewTable("name", "bytes").AlignRight(1)
	table.Indent = "  "
	table.Row("a", 12345)
	table.Row("größer", 1)
	var b strings.Builder
	n, err := table.WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		t.Fatalf("WriteTo = %d, %v; wrote %d", n, err, b.Len())
	}
	want := "  name    bytes\n  a       12345\n  größer      1\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestReportCountsWhatDoesNotHold(t *testing.T) {
	var b strings.Builder
	r := NewReport(&b, 8)
	r.Section("Wire")
	r.Check(true, "marker", "%d times", 0)
	r.Check(false, "plain", "%d segments", 3)
	r.More("mend: %s", "none")
	r.Warn("clock", "late")
	r.Info("cipher", "x")
	want := "\nWire\n  ✓ marker    0 times\n  ✗ plain     3 segments\n              mend: none\n  ! clock     late\n    cipher    x\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"plain"}, r.Failed()); diff != "" || r.Lines() != 2 {
		t.Errorf("%d lines, failed: %s", r.Lines(), diff)
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 4 << 20: "4.0 MiB", 3 << 30: "3.0 GiB"} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", n, got, want)
		}
	}
}

// A peer's words do not reach the terminal as orders to it.
func TestTableShowsWhatIsNotPrintable(t *testing.T) {
	table := NewTable()
	table.Row("a\x1b[2Jb\nc\u202e", "größer")
	var b strings.Builder
	table.WriteTo(&b)
	if want := "a\ufffd[2Jb\ufffdc\ufffd  größer\n"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

func TestScreenKeepsToItsRows(t *testing.T) {
	for _, tt := range []struct {
		text          string
		rows, columns int
		want          string
	}{
		{"a\nb\nc\n", 0, 80, "a\nb\nc\n"},
		{"a\nb\nc\n", 4, 80, "a\nb\nc\n"},
		{"a\nb\nc\n", 3, 80, "a\n… and 2 lines more\n"},
		{"a\nb\nc\n", 1, 80, "… and 3 lines more\n"},
		// Lines that are longer than a row: each of these takes two.
		{"größe\nbbbbb\n", 5, 3, "größe\nbbbbb\n"},
		{"größe\nbbbbb\n", 4, 3, "größe\n… and 1 lines more\n"},
		{"größe\nbbbbb\n", 3, 3, "… and 2 lines more\n"},
		{"größe\nbbbbb\n", 3, 5, "größe\nbbbbb\n"},
		{"größe\nbbbbb\n", 3, 0, "größe\nbbbbb\n"},
	} {
		if got := fit(tt.text, tt.rows, tt.columns); got != tt.want {
			t.Errorf("in %d rows of %d: %q, want %q", tt.rows, tt.columns, got, tt.want)
		}
	}
	var b strings.Builder
	s := NewScreen(&b)
	if err := s.Show("a\n"); err != nil || s.IsTerminal() || b.String() != "a\n" {
		t.Errorf("no terminal has %q, %v", &b, err)
	}
}
