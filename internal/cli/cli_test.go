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
		rows int
		want string
	}{
		{0, "a\nb\nc\n"},
		{4, "a\nb\nc\n"},
		{3, "a\n… and 2 lines more\n"},
		{1, "… and 3 lines more\n"},
	} {
		if got := fit("a\nb\nc\n", tt.rows); got != tt.want {
			t.Errorf("in %d rows: %q, want %q", tt.rows, got, tt.want)
		}
	}
	var b strings.Builder
	s := NewScreen(&b)
	if err := s.Show("a\n"); err != nil || s.IsTerminal() || b.String() != "a\n" {
		t.Errorf("no terminal has %q, %v", &b, err)
	}
}
