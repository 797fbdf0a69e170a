// SPDX-License-Identifier: Apache-2.0

package main

import "testing"

// YAML says what JSON does: text that looks like something else is quoted, and
// nothing is folded or out of order.
func TestFormIsYAML(t *testing.T) {
	type inner struct {
		B string `json:"b"`
		A []int  `json:"a"`
	}
	long := "a line of more than eighty characters, in which a folded one would have been broken in two"
	got, err := form(outputYAML, map[string]any{
		"a": "1", "b": 1, "c": "true", "d": true, "e": "", "f": nil, "g": []string{}, "h": map[string]int{}, "i": "x: <y> & z", "j": "10.0.0.1:80", "k": "fd00::1",
		"l": "2026-11-24T21:15:14Z", "m": "one\ntwo\n", "n": "- a", "o": []inner{{"x", []int{2, 1}}, {"~", nil}}, "p": 1.5, "q": long,
	}, nil)
	want := `a: "1"
b: 1
c: "true"
d: true
e: ""
f: null
g: []
h: {}
i: "x: <y> & z"
j: 10.0.0.1:80
k: fd00::1
l: "2026-11-24T21:15:14Z"
m: |
  one
  two
n: "- a"
o:
- b: x
  a:
  - 2
  - 1
- b: "~"
  a: null
p: 1.5
q: ` + long + "\n"
	if err != nil || got != want {
		t.Errorf("%v\n%s", err, got)
	}
}
