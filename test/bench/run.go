// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"
)

// work is a row of the table.
type work struct {
	name string
	load load
	bulk bool // Gbit/s and seconds per GB, not operations
}

func works(each time.Duration) []work {
	return []work{
		{"1 bulk stream up", load{Mode: modeSink, Conns: 1, For: each}, true},
		{"1 bulk stream down", load{Mode: modeSource, Conns: 1, For: each}, true},
		{"8 bulk streams up", load{Mode: modeSink, Conns: 8, For: each}, true},
		{"64 B, 1 connection", load{Mode: modeEcho, Conns: 1, Size: 64, For: each}, false},
		{"64 B, 32 connections", load{Mode: modeEcho, Conns: 32, Size: 64, For: each}, false},
		{"16 KB, 32 connections", load{Mode: modeEcho, Conns: 32, Size: 16 << 10, For: each}, false},
		{"connect, request, close, 8", load{Mode: modeEcho, Conns: 8, Size: 64, Churn: true, For: each}, false},
	}
}

// row has a work's medians on one path.
type row struct {
	gbit, perSec float64
	p50, p99     time.Duration
	cpuPerGB     float64       // seconds
	cpuPerOp     time.Duration // of both daemons
}

func summary(s []sample) row {
	var gbit, rate, perGB []float64
	var p50, p99, perOp []time.Duration
	for _, x := range s {
		sec := x.Elapsed.Seconds()
		gbit = append(gbit, float64(x.Bytes)*8/1e9/sec)
		rate = append(rate, float64(x.Ops)/sec)
		perGB = append(perGB, x.cpu.Seconds()/(float64(max(x.Bytes, 1))/1e9))
		perOp = append(perOp, x.cpu/time.Duration(max(x.Ops, 1)))
		p50, p99 = append(p50, x.P50), append(p99, x.P99)
	}
	return row{median(gbit), median(rate), median(p50), median(p99), median(perGB), median(perOp)}
}

func (b *bench) run(ctx context.Context, rounds, idle int, only string) error {
	list := works(b.each)
	direct, culvert := make([][]sample, len(list)), make([][]sample, len(list))
	var beside, besideDirect []besides
	for round := range rounds {
		for i, w := range list {
			if !strings.Contains(w.name, only) {
				continue
			}
			for _, p := range []struct {
				path path
				to   *[]sample
			}{{b.direct, &direct[i]}, {b.culvert, &culvert[i]}} {
				if err := ctx.Err(); err != nil {
					return err
				}
				b.progress("round %d of %d: %s, %s", round+1, rounds, w.name, p.path.name)
				s, err := b.measure(p.path, w.load)
				if err != nil {
					return fmt.Errorf("%s: %w", w.name, err)
				}
				*p.to = append(*p.to, s)
			}
		}
		if only == "" || strings.Contains("beside", only) {
			for _, p := range []struct {
				path path
				to   *[]besides
			}{{b.direct, &besideDirect}, {b.culvert, &beside}} {
				s, err := b.beside(p.path)
				if err != nil {
					return fmt.Errorf("small beside bulk, %s: %w", p.path.name, err)
				}
				*p.to = append(*p.to, s)
			}
		}
	}
	b.progress("")
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(out, "work\tdirect\tCulvert\tratio\tp50 us\tratio\tp99 us\tratio\tCPU\t")
	rows := map[string]row{}
	for i, w := range list {
		if len(culvert[i]) == 0 {
			continue
		}
		d, c := summary(direct[i]), summary(culvert[i])
		rows[w.name] = c
		if w.bulk {
			fmt.Fprintf(out, "%s\t%.1f Gbit/s\t%.1f Gbit/s\t%.2f\t\t\t\t\t%.2f s/GB\t\n", w.name, d.gbit, c.gbit, c.gbit/d.gbit, c.cpuPerGB)
			continue
		}
		fmt.Fprintf(out, "%s\t%.1f k/s\t%.1f k/s\t%.2f\t%d\t%.1f\t%d\t%.1f\t%d us\t\n", w.name, d.perSec/1e3, c.perSec/1e3, c.perSec/d.perSec,
			c.p50.Microseconds(), float64(c.p50)/float64(d.p50), c.p99.Microseconds(), float64(c.p99)/float64(d.p99), c.cpuPerOp.Microseconds())
	}
	if d, c := besideSummary(besideDirect), besideSummary(beside); len(beside) > 0 {
		fmt.Fprintf(out, "64 B beside 1 bulk stream\t\t\t\t%d\t%.1f\t%d\t%.1f\t\t\n", c.p50.Microseconds(), float64(c.p50)/float64(d.p50), c.p99.Microseconds(), float64(c.p99)/float64(d.p99))
	}
	out.Flush()
	if only != "" && len(beside) == 0 {
		return nil
	}
	return b.shapes(rows, beside, idle, only)
}

// besides is a small request beside a bulk stream of the same two pods.
type besides struct {
	p50, p99    time.Duration
	alone, with float64 // bulk's Gbit/s
}

func besideSummary(all []besides) besides {
	var p50, p99 []time.Duration
	var kept []float64
	for _, s := range all {
		p50, p99, kept = append(p50, s.p50), append(p99, s.p99), append(kept, s.with/s.alone)
	}
	return besides{median(p50), median(p99), 1, median(kept)}
}

func (b *bench) beside(p path) (besides, error) {
	b.progress("small beside bulk")
	bulk := load{Mode: modeSink, Conns: 1, For: b.each}
	alone, err := b.measure(p, bulk)
	if err != nil {
		return besides{}, err
	}
	small := load{Mode: modeEcho, Conns: 1, Size: 64, For: b.each * 3 / 4}
	wait, in, _, err := b.begin(p, bulk)
	if err != nil {
		return besides{}, err
	}
	defer in.Close()
	s, err := b.measure(p, small)
	if err != nil {
		return besides{}, err
	}
	with, err := wait()
	if err != nil {
		return besides{}, err
	}
	rate := func(r result) float64 { return float64(r.Bytes) * 8 / 1e9 / r.Elapsed.Seconds() }
	return besides{s.P50, s.P99, rate(alone.result), rate(with)}, nil
}
