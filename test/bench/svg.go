// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html"
	"os"
	"path/filepath"
	"strings"
)

// chart is bars side by side: a group for each work, a bar for each path.
type chart struct {
	file, title string
	measure     measure
}

// charts are those that are drawn of every report that has their measure.
var charts = []chart{
	{"bulk.svg", "Bulk, Gbit/s (more is better)", gbit},
	{"bulk-cpu.svg", "Bulk, CPU seconds of the proxies for a gigabyte (less is better)", perGB},
	{"rate.svg", "Requests and connections a second (more is better)", rate},
	{"cpu.svg", "CPU microseconds of the proxies for a request or a connection (less is better)", perUnit},
	{"p50.svg", "Median time of a request or a connection, microseconds (less is better)", p50},
	{"p99.svg", "99th percentile of it, microseconds (less is better)", p99},
	{"rest.svg", "Resident memory at rest, MB a node (less is better)", atRest},
	{"idle.svg", "Memory of an idle connection at both ends, bytes (less is better)", each},
}

// draw writes the charts into a folder.
func (r *report) draw(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var names []string
	for _, p := range r.Paths {
		if p.Missing == "" {
			names = append(names, p.Name)
		}
	}
	rows := r.rows()
	for _, c := range charts {
		var groups []group
		for _, row := range rows {
			if row.measure == c.measure {
				groups = append(groups, group{row.work, row.of})
			}
		}
		if len(groups) == 0 {
			continue
		}
		footer := fmt.Sprintf("%s, Linux %s, %d CPUs, commit %s; medians of %d rounds with 95 %% intervals", r.CPU, r.Kernel, r.CPUs, r.Commit, r.Rounds)
		if err := os.WriteFile(filepath.Join(dir, c.file), []byte(bars(c.title, footer, names, groups, false)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

type group struct {
	name string
	of   map[string]estimate // by path
}

// colours of the paths, in their order; ours stands out.
var colours = map[string]string{
	"direct": "#9a9a9a", "culvert": "#0b6e4f", "envoy": "#ac6199", "ztunnel": "#466bb0",
	"haproxy": "#c9a227", "ghostunnel": "#b5651d", "culvert-sidecar": "#8fc9ae",
}

// bars draws groups one below the other. Each has a scale of its own, where what
// is compared are a group's bars, or all have the same.
func bars(title, footer string, paths []string, groups []group, same bool) string {
	const (
		width, left, right = 1000, 410, 100
		bar, gap, head     = 15, 14, 60
	)
	var b strings.Builder
	text := func(x, y int, anchor, style, s string) {
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="%s" %s>%s</text>`+"\n", x, y, anchor, style, html.EscapeString(s))
	}
	y, most := head, 0.0
	for _, g := range groups {
		for _, e := range g.of {
			most = max(most, e.high)
		}
	}
	for _, g := range groups {
		if !same {
			most = 0
		}
		n := 0
		for _, p := range paths {
			if e, ok := g.of[p]; ok {
				most, n = max(most, e.high), n+1
			}
		}
		if n == 0 || most <= 0 {
			continue
		}
		text(left-110, y+n*bar/2+4, "end", `font-weight="bold"`, g.name)
		for _, p := range paths {
			e, ok := g.of[p]
			if !ok {
				continue
			}
			scale := func(v float64) float64 { return max(v, 0) / most * (width - left - right) }
			text(left-6, y+bar-4, "end", "", p)
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", left, y+1, scale(e.median), bar-3, colours[p])
			if e.high > e.low {
				fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%[3]d" stroke="#222"/>`+"\n", left+scale(e.low), left+scale(e.high), y+bar/2)
			}
			text(left+int(scale(e.high))+6, y+bar-4, "start", "", figure(e.median))
			y += bar
		}
		y += gap
	}
	height := y + 16
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="11">
<rect width="100%%" height="100%%" fill="#fff"/>
<text x="12" y="24" font-size="15" font-weight="bold">%s</text>
<text x="12" y="42" fill="#666">%s</text>
%s</svg>
`, width, height, html.EscapeString(title), html.EscapeString(footer), b.String())
}
