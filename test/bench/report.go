// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/culvert-mesh/culvert/internal/cli"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// report is a run, as it is kept: what it was made with, and each sample.
type report struct {
	Time    time.Time     `json:"time"`
	Command string        `json:"command"`
	Commit  string        `json:"commit"`
	CPU     string        `json:"cpu"`
	CPUs    int           `json:"cpus"`
	Kernel  string        `json:"kernel"`
	Go      string        `json:"go"`
	Rounds  int           `json:"rounds"`
	For     time.Duration `json:"for"`
	Idle    int           `json:"idle"`
	Paths   []pathEntry   `json:"paths"`
	Works   []workEntry   `json:"works"`
	Memory  []memoryEntry `json:"memory"`
	Samples []sample      `json:"samples"`
}

type pathEntry struct {
	Name    string `json:"name"`
	About   string `json:"about,omitempty"`
	Wire    string `json:"wire,omitempty"`
	Missing string `json:"missing,omitempty"` // why it is not measured
}

type workEntry struct {
	Name string `json:"name"`
	Unit string `json:"unit"`
}

// memoryEntry is a figure that has no rounds.
type memoryEntry struct {
	Work  string  `json:"work"`
	Path  string  `json:"path"`
	Value float64 `json:"value"`
}

func newReport(o options) *report {
	return &report{
		Time: time.Now().UTC().Round(time.Second), Command: strings.Join(os.Args, " "), Commit: lab.Commit(),
		CPU: lab.CPU(), CPUs: runtime.NumCPU(), Kernel: lab.Kernel(), Go: runtime.Version(),
		Rounds: o.rounds, For: o.each, Idle: o.idle,
	}
}

func (r *report) write(file string) error { return writeJSON(file, r) }

func writeJSON(file string, v any) error {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

func readReport(file string) (*report, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := new(report)
	return r, json.Unmarshal(b, r)
}

// row is one measure of a work: an estimate for each path that has one.
type row struct {
	work    string
	measure measure
	of      map[string]estimate
	ratio   map[string]estimate // Culvert's value by this path's
	target  target
}

// rows are the whole of a report.
func (r *report) rows() []row {
	var out []row
	targets := map[string]map[measure]target{}
	for _, w := range works(0) {
		targets[w.name] = w.targets
	}
	for _, w := range r.Works {
		by := map[measure]map[string]map[int]float64{} // path, round
		var order []measure
		for _, s := range r.Samples {
			if s.Work != w.Name {
				continue
			}
			for _, v := range s.values(w.Unit) {
				if by[v.measure] == nil {
					by[v.measure] = map[string]map[int]float64{}
					order = append(order, v.measure)
				}
				if by[v.measure][s.Path] == nil {
					by[v.measure][s.Path] = map[int]float64{}
				}
				by[v.measure][s.Path][s.Round] = v.value
			}
		}
		for _, m := range order {
			if m == perUnit || m == perGB {
				delete(by[m], "direct") // it has no proxies
			}
			out = append(out, newRow(w.Name, m, by[m], targets[w.Name][m]))
		}
	}
	for _, name := range []string{restWork, idleWork} {
		m := atRest
		if name == idleWork {
			m = each
		}
		by := map[string]map[int]float64{}
		for _, x := range r.Memory {
			if x.Work == name {
				by[x.Path] = map[int]float64{1: x.Value}
			}
		}
		if len(by) > 0 {
			out = append(out, newRow(name, m, by, memoryTargets[name][m]))
		}
	}
	return out
}

// newRow has the medians, and the ratios of medians; a ratio's interval is that of
// the rounds' own ratios, since what disturbs a round disturbs all its paths.
func newRow(work string, m measure, by map[string]map[int]float64, t target) row {
	out := row{work: work, measure: m, of: map[string]estimate{}, ratio: map[string]estimate{}, target: t}
	for path, rounds := range by {
		var values, ratios []float64
		for round, v := range rounds {
			values = append(values, v)
			if ours, ok := by["culvert"][round]; ok && v != 0 {
				ratios = append(ratios, ours/v)
			}
		}
		out.of[path] = summarise(values)
		out.ratio[path] = summarise(ratios)
	}
	ours, ok := out.of["culvert"]
	for path, e := range out.of {
		if q := out.ratio[path]; ok && e.median > 0 {
			q.median = ours.median / e.median
			out.ratio[path] = q
		} else {
			delete(out.ratio, path)
		}
	}
	return out
}

// verdict is how a ratio is to its target.
func (r row) verdict(path string, asked float64) (ratio, want, mark string) {
	q, ok := r.ratio[path]
	if !ok || math.IsNaN(q.median) {
		return "", "", ""
	}
	ratio = fmt.Sprintf("%.2f", q.median)
	if q.low != q.high {
		ratio += fmt.Sprintf(" (%.2f-%.2f)", q.low, q.high)
	}
	switch {
	case asked == 0:
	case r.measure.more():
		want, mark = fmt.Sprintf(">= %g", asked), "✗"
		if q.median >= asked {
			mark = "✓"
		}
	default:
		want, mark = fmt.Sprintf("<= %g", asked), "✗"
		if q.median <= asked {
			mark = "✓"
		}
	}
	return ratio, want, mark
}

// head says what a report was made with.
func (r *report) head(w io.Writer) {
	fmt.Fprintf(w, "%s, Linux %s, %d CPUs, %s; commit %s, %s\n%s\n", r.CPU, r.Kernel, r.CPUs, r.Go, r.Commit, r.Time.Format(time.RFC3339), r.Command)
}

// show prints a report.
func (r *report) show(w io.Writer) error {
	r.head(w)
	fmt.Fprintf(w, "%d interleaved rounds, %v each; medians; CPU is that of the proxies\n\n", r.Rounds, r.For)
	what := cli.NewTable("path", "what", "seen between the nodes")
	for _, p := range r.Paths {
		if p.Missing != "" {
			p.About, p.Wire = "not measured: "+p.Missing, ""
		}
		what.Row(p.Name, p.About, p.Wire)
	}
	if _, err := what.WriteTo(w); err != nil {
		return err
	}
	fmt.Fprintln(w)
	head := []string{"work", "measure"}
	for _, p := range r.Paths {
		head = append(head, p.Name)
	}
	against := []string{}
	for _, p := range r.Paths {
		if p.Name == "envoy" || p.Name == "ztunnel" {
			against = append(against, p.Name)
			head = append(head, "to "+p.Name, "target", "")
		}
	}
	table := cli.NewTable(head...)
	right := []int{}
	for i := range r.Paths {
		right = append(right, 2+i)
	}
	table.AlignRight(right...)
	last := ""
	for _, row := range r.rows() {
		cells := []any{row.work, row.measure}
		if row.work == last {
			cells[0] = ""
		}
		last = row.work
		for _, p := range r.Paths {
			e, ok := row.of[p.Name]
			switch {
			case p.Missing != "":
				cells = append(cells, "not measured")
			case !ok:
				cells = append(cells, "")
			default:
				cells = append(cells, figure(e.median))
			}
		}
		for _, path := range against {
			asked := row.target.envoy
			if path == "ztunnel" {
				asked = row.target.ztunnel
			}
			ratio, want, mark := row.verdict(path, asked)
			cells = append(cells, ratio, want, mark)
		}
		table.Row(cells...)
	}
	_, err := table.WriteTo(w)
	return err
}

// figure prints a number with three digits that say something.
func figure(v float64) string {
	switch {
	case math.IsNaN(v):
		return ""
	case math.Abs(v) >= 100:
		return fmt.Sprintf("%.0f", v)
	case math.Abs(v) >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
