// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"strings"
	"testing"
)

func TestMetricsSum(t *testing.T) {
	m, err := parseMetrics(strings.NewReader(`# HELP a_total things
# TYPE a_total counter
a_total{reason="o\"k, {x}",reporter="source"} 3
a_total{reason="reset",reporter="source"} 4 1395066363000
a_total{reason="reset",reporter="destination"} 1e+01
b 1.5
c{} 2
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		labels []string
		want   float64
	}{
		{"a_total", nil, 17},
		{"a_total", []string{"reporter", "source"}, 7},
		{"a_total", []string{"reporter", "source", "reason", `o"k, {x}`}, 3},
		{"a_total", []string{"reporter", "nobody"}, 0},
		{"b", nil, 1.5}, {"c", nil, 2}, {"d", nil, 0},
	} {
		if got := m.Sum(c.name, c.labels...); got != c.want {
			t.Errorf("Sum(%s, %q) = %v, want %v", c.name, c.labels, got, c.want)
		}
	}
	for _, bad := range []string{"a", "a{b} 1", `a{b="c} 1`, "a x"} {
		if _, err := parseMetrics(strings.NewReader(bad)); err == nil {
			t.Errorf("parsed %q", bad)
		}
	}
}
