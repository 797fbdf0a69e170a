// SPDX-License-Identifier: Apache-2.0

package docs

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// block is a fenced block of a page.
type block struct {
	page string
	line int
	lang string
	on   string // the machine, of a block of commands: the word behind its language
	text string
	want string // what its output is to have: the block of text that follows it
}

func (b block) String() string { return fmt.Sprintf("%s:%d", b.page, b.line) }

// read returns the blocks of a page, or of its section with a heading.
func read(t *testing.T, page, heading string) []block {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", page))
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := parse(page, string(data), heading)
	if err != nil {
		t.Fatal(err)
	}
	return blocks
}

func parse(page, data, heading string) ([]block, error) {
	var out []block
	var in *block
	inside := heading == ""
	for i, line := range strings.Split(data, "\n") {
		fence, isFence := strings.CutPrefix(line, "```")
		switch {
		case in == nil && strings.HasPrefix(line, "## ") && heading != "":
			inside = line == "## "+heading
		case !inside:
		case in == nil && isFence:
			in = &block{page: page, line: i + 1}
			in.lang, in.on, _ = strings.Cut(fence, " ")
		case in != nil && isFence && fence != "":
			return nil, fmt.Errorf("%s: a fence within a block", in)
		case in != nil && isFence && in.lang == "text":
			if len(out) == 0 || out[len(out)-1].lang != "sh" || out[len(out)-1].want != "" {
				return nil, fmt.Errorf("%s: the output of no commands", in)
			}
			out[len(out)-1].want = in.text
			in = nil
		case in != nil && isFence:
			out = append(out, *in)
			in = nil
		case in != nil:
			in.text += line + "\n"
		}
	}
	if in != nil || len(out) == 0 {
		return nil, fmt.Errorf("%s: a block that does not end, or none under %q", page, heading)
	}
	return out, nil
}

// missing returns the first line of want that is not in got, in that order. In
// want, … stands for anything within a line, and blanks for any number of them.
func missing(want, got string) string {
	lines := strings.Split(got, "\n")
	for _, w := range strings.Split(want, "\n") {
		if strings.TrimSpace(w) == "" || strings.TrimSpace(w) == "…" {
			continue
		}
		parts := strings.Split(strings.Join(strings.Fields(w), " "), "…")
		for i := range parts {
			parts[i] = regexp.QuoteMeta(parts[i])
		}
		pattern := regexp.MustCompile("^" + strings.Join(parts, ".*") + "$")
		at := slices.IndexFunc(lines, func(l string) bool { return pattern.MatchString(strings.Join(strings.Fields(l), " ")) })
		if at < 0 {
			return w
		}
		lines = lines[at+1:]
	}
	return ""
}

func TestMissing(t *testing.T) {
	const got = "one  1\ntwo a 2 b\nthree\n"
	for want, miss := range map[string]string{
		"one 1":       "",
		"two … b":     "",
		"…\nthree":    "",
		"one 1\none":  "one",
		"three\ntwo…": "two…",
		"tw":          "tw",
		"o.e 1":       "o.e 1",
	} {
		if m := missing(want, got); m != miss {
			t.Errorf("%q: missing %q, want %q", want, m, miss)
		}
	}
}

func TestParse(t *testing.T) {
	const page = "# P\n```sh\na\n```\n## S\n```sh node-1\nb\n```\ntext\n```text\nc\n```\n## T\n```yaml\nd\n```\n"
	got, err := parse("p", page, "S")
	if want := (block{"p", 6, "sh", "node-1", "b\n", "c\n"}); err != nil || len(got) != 1 || got[0] != want {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := parse("p", page, ""); err != nil || len(got) != 3 {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"```text\na\n```\n", "```sh\na\n", "nothing"} {
		if got, err := parse("p", bad, ""); err == nil {
			t.Errorf("%q is %v", bad, got)
		}
	}
}
