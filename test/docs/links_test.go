// SPDX-License-Identifier: Apache-2.0

package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	fenced  = regexp.MustCompile("(?ms)^```.*?^```")
)

// Each link of a page to another place of the repository leads there: to a file that
// is there, and to a heading that it has.
func TestLinks(t *testing.T) {
	root := filepath.Join("..", "..")
	pages, err := filepath.Glob(filepath.Join(root, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, page := range append(pages, more...) {
		for _, to := range broken(t, page, &seen) {
			t.Errorf("%s: %s leads nowhere", page, to)
		}
	}
	if seen < 50 {
		t.Errorf("only %d links were found", seen)
	}
}

// broken lists the links of a page that lead nowhere, and counts all.
func broken(t *testing.T, page string, seen *int) (out []string) {
	t.Helper()
	for _, m := range link.FindAllStringSubmatch(prose(t, page), -1) {
		to := m[1]
		if strings.Contains(to, "://") {
			continue
		}
		*seen++
		file, anchor, _ := strings.Cut(to, "#")
		if file = filepath.Join(filepath.Dir(page), file); strings.HasPrefix(to, "#") {
			file = page
		}
		if _, err := os.Stat(file); err != nil || anchor != "" && !anchors(t, file)[anchor] {
			out = append(out, to)
		}
	}
	return out
}

// prose is a page without its fenced blocks.
func prose(t *testing.T, page string) string {
	t.Helper()
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	return fenced.ReplaceAllString(string(data), "")
}

// anchors are the names by which a page's headings are linked to, as GitHub makes
// them.
func anchors(t *testing.T, page string) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	for _, m := range heading.FindAllStringSubmatch(prose(t, page), -1) {
		out[strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-', r == '_', unicode.IsLetter(r), unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, m[1])] = true
	}
	return out
}

func TestBrokenLinksAreSeen(t *testing.T) {
	page := filepath.Join(t.TempDir(), "p.md")
	const text = "# A, b: c?\n[ok](#a-b-c) [ok](p.md#a-b-c) [ok](https://x.invalid/y)\n[no](#a-b) [no](q.md) [no](p.md#d)\n```\n# d\n[x](none)\n```\n"
	if err := os.WriteFile(page, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	seen := 0
	if got := strings.Join(broken(t, page, &seen), " "); got != "#a-b q.md p.md#d" || seen != 5 {
		t.Errorf("broken are %s, of %d", got, seen)
	}
}
