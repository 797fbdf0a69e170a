// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-mesh/culvert/internal/cli"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// point is what a path costs at some size of the mesh.
type point struct {
	Grows      string  `json:"grows"` // "pods" or "workloads"
	Path       string  `json:"path"`
	Pods       int     `json:"pods"` // on node 1
	Workloads  int     `json:"workloads"`
	Identities int     `json:"identities"`
	Start      float64 `json:"start_s"`    // until node 1 carries all its pods
	Memory     float64 `json:"memory_mb"`  // of node 1, after a request of each pod
	Connect    float64 `json:"connect_us"` // connect, request, close by one pod: the median
	Request    float64 `json:"request_us"` // of 64 B on an open connection: the median
}

// scale is such a run, as it is kept.
type scale struct {
	report
	Points []point `json:"points"`
}

// scaleMain shows how cost grows with what does not concern a connection.
func scaleMain(ctx context.Context, args []string) (err error) {
	o := options{each: 2 * time.Second, paths: "culvert,envoy,ztunnel,culvert-sidecar", raw: "out/bench/scale.json", charts: "out/bench/scale"}
	f := o.flags("scale")
	pods := f.String("pods", "2,20,100,200", "pods on node 1, with commas between")
	workloads := f.String("workloads", "2,1000,10000,100000", "workloads that Culvert is told of, with commas between; at most 10000 identities among them")
	if err := f.Parse(args); err != nil {
		return err
	}
	podCounts, err := counts(*pods)
	if err != nil {
		return err
	}
	workloadCounts, err := counts(*workloads)
	if err != nil {
		return err
	}
	chosen, err := o.binaries.choose(o.paths)
	if err != nil {
		return err
	}
	if err := sweep(ctx); err != nil {
		return err
	}
	if _, err := raiseFiles(); err != nil {
		return err
	}
	r := &scale{report: *newReport(o)}
	b := &bench{options: o, report: &r.report}
	add := func(p namedPath, x point) error {
		b.progress("%s: %d pods, %d workloads", p.name, x.Pods, x.Workloads)
		if err := x.measure(ctx, p, o.each); err != nil {
			return fmt.Errorf("%s with %d pods and %d workloads: %w", p.name, x.Pods, x.Workloads, err)
		}
		b.line("%s: %d pods, %d workloads: started in %.1f s, %.1f MB", p.name, x.Pods, x.Workloads, x.Start, x.Memory)
		r.Points = append(r.Points, x)
		return r.write(o.raw)
	}
	for _, p := range chosen {
		entry := pathEntry{Name: p.name, Missing: p.path.missing()}
		if entry.Missing == "" {
			entry.About = p.path.about()
			for _, n := range podCounts {
				if err := add(p, point{Grows: "pods", Path: p.name, Pods: n}); err != nil {
					return err
				}
			}
			if p.name == "culvert" {
				for _, n := range workloadCounts {
					if err := add(p, point{Grows: "workloads", Path: p.name, Pods: 2, Workloads: n}); err != nil {
						return err
					}
				}
			}
		}
		r.Paths = append(r.Paths, entry)
	}
	if err := r.write(o.raw); err != nil {
		return err
	}
	if err := r.show(); err != nil {
		return err
	}
	return r.draw(o.charts)
}

func counts(list string) (out []int, err error) {
	for s := range strings.SplitSeq(list, ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q is no count", s)
		}
		out = append(out, n)
	}
	return out, nil
}

// measure lays a mesh of that size out and fills in the rest.
func (x *point) measure(ctx context.Context, p namedPath, d time.Duration) (err error) {
	s, err := layOut(ctx, p, x.Pods)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	far := []*lab.Pod{s.server}
	real := append(append([]*lab.Pod(nil), s.lab.Nodes[0].Pods...), far...)
	for _, p := range real {
		s.workloads = append(s.workloads, p.Workload())
	}
	identities := map[string]bool{}
	for i := len(s.workloads); i < x.Workloads; i++ {
		s.workloads = append(s.workloads, stranger(i))
	}
	for _, w := range s.workloads {
		identities[w.ServiceAccount] = true
	}
	x.Workloads, x.Identities = len(s.workloads), len(identities)
	if err := s.path.carry(ctx, s, s.lab.Nodes[1], far); err != nil {
		return err
	}
	begin := time.Now()
	if err := s.path.carry(ctx, s, s.lab.Nodes[0], s.lab.Nodes[0].Pods); err != nil {
		return err
	}
	x.Start = time.Since(begin).Seconds()
	if err := s.serve(s.server); err != nil {
		return err
	}
	if err := s.prove(ctx); err != nil {
		return err
	}
	for _, p := range s.lab.Nodes[0].Pods {
		if _, err := s.doIn(ctx, p, load{Mode: modeEcho, Conns: 1, Size: 64, For: time.Millisecond}); err != nil {
			return fmt.Errorf("a request of %s: %w", p.Name, err)
		}
	}
	n, err := s.memory(s.lab.Nodes[0])
	if err != nil {
		return err
	}
	x.Memory = float64(n) / 1e6
	us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	r, err := s.do(ctx, load{Mode: modeEcho, Conns: 1, Size: 64, Churn: true, For: d})
	if err != nil {
		return err
	}
	x.Connect = us(r.P50)
	r, err = s.do(ctx, load{Mode: modeEcho, Conns: 1, Size: 64, For: d})
	x.Request = us(r.P50)
	return err
}

// stranger is a workload that has nothing to do with what is measured.
func stranger(i int) lab.Workload {
	const identities = 10000
	return lab.Workload{
		Name: fmt.Sprintf("stranger-%d", i), Namespace: "elsewhere", ServiceAccount: fmt.Sprintf("sa-%d", i%identities),
		Node: fmt.Sprintf("node-%d", i%500), Protocol: "hbone",
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 128 + byte(i>>16), byte(i >> 8), byte(i)})},
	}
}

func (r *scale) write(file string) error { return writeJSON(file, r) }

// show prints the points.
func (r *scale) show() error {
	r.head(os.Stdout)
	for _, p := range r.Paths {
		if p.Missing != "" {
			fmt.Printf("%s: not measured: %s\n", p.Name, p.Missing)
		}
	}
	t := cli.NewTable("path", "pods on node 1", "workloads", "identities", "start, s", "memory, MB", "connect, us", "request, us", "memory to envoy")
	t.AlignRight(1, 2, 3, 4, 5, 6, 7, 8)
	sidecars := map[int]float64{} // Envoy's memory, by pods
	for _, x := range r.Points {
		if x.Path == "envoy" {
			sidecars[x.Pods] = x.Memory
		}
	}
	for _, x := range r.Points {
		ratio := ""
		if e := sidecars[x.Pods]; e > 0 && x.Grows == "pods" {
			ratio = fmt.Sprintf("%.3f", x.Memory/e)
		}
		t.Row(x.Path, x.Pods, x.Workloads, x.Identities, figure(x.Start), figure(x.Memory), figure(x.Connect), figure(x.Request), ratio)
	}
	_, err := t.WriteTo(os.Stdout)
	return err
}

// draw writes a chart for each figure, by pods and by workloads, with one scale
// for all sizes.
func (r *scale) draw(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var names []string
	for _, p := range r.Paths {
		names = append(names, p.Name)
	}
	footer := fmt.Sprintf("%s, Linux %s, %d CPUs, commit %s", r.CPU, r.Kernel, r.CPUs, r.Commit)
	for _, c := range []struct {
		file, title string
		of          func(point) float64
	}{
		{"start", "Start of a node, seconds (less is better)", func(x point) float64 { return x.Start }},
		{"memory", "Resident memory of a node, MB (less is better)", func(x point) float64 { return x.Memory }},
		{"connect", "Connect, request, close: median, microseconds (less is better)", func(x point) float64 { return x.Connect }},
	} {
		for _, grows := range []string{"pods", "workloads"} {
			var groups []group
			for _, x := range r.Points {
				if x.Grows != grows {
					continue
				}
				name := fmt.Sprintf("%d pods", x.Pods)
				if grows == "workloads" {
					name = fmt.Sprintf("%d workloads, %d identities", x.Workloads, x.Identities)
				}
				i := 0
				for i < len(groups) && groups[i].name != name {
					i++
				}
				if i == len(groups) {
					groups = append(groups, group{name, map[string]estimate{}})
				}
				v := c.of(x)
				groups[i].of[x.Path] = estimate{v, v, v}
			}
			if len(groups) == 0 {
				continue
			}
			file := filepath.Join(dir, c.file+"-"+grows+".svg")
			if err := os.WriteFile(file, []byte(bars(c.title, footer, names, groups, true)), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}
