// SPDX-License-Identifier: Apache-2.0

// Bench measures Culvert beside direct TCP, beside sidecars and beside Istio's
// ztunnel: each path has two nodes and two pods of its own, all do the same work
// in interleaved rounds, so that a machine that drifts hits all alike. It prints
// medians and ratios beside the targets, keeps every sample as JSON, and draws
// charts of it. docs/BENCHMARKS.md says how to read them.
//
// It starts itself again for the client's and the server's part. Needs root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// prefix begins the names of all that a bench makes.
const prefix = "culvert-bench"

var commands = map[string]func(context.Context, []string) error{
	"serve":  func(context.Context, []string) error { return serveMain() },
	"load":   func(_ context.Context, args []string) error { return loadMain(args) },
	"quick":  quickMain,
	"full":   fullMain,
	"apps":   appsMain,
	"scale":  scaleMain,
	"report": reportMain,
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := errors.New("usage: bench quick|full|apps|scale|report [flags]; make help lists what runs it")
	if len(os.Args) > 1 && commands[os.Args[1]] != nil {
		err = commands[os.Args[1]](ctx, os.Args[2:])
	}
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are what quick and full have in common.
type options struct {
	rounds      int
	each        time.Duration
	idle        int
	paths, only string
	raw, charts string
	profile     string
	binaries    binaries
	setUp       func(context.Context, *site) error // what else a site needs
}

func (o *options) flags(name string) *flag.FlagSet {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.IntVar(&o.rounds, "rounds", o.rounds, "interleaved rounds")
	f.DurationVar(&o.each, "for", o.each, "length of one measurement")
	f.IntVar(&o.idle, "idle", o.idle, "idle connections for the memory of one; 0: do not measure it")
	f.StringVar(&o.paths, "paths", o.paths, "paths to measure, with commas between")
	f.StringVar(&o.only, "only", "", "run the works whose name contains this")
	f.StringVar(&o.raw, "raw", o.raw, "file for every sample, as JSON")
	f.StringVar(&o.charts, "charts", o.charts, "folder for charts, as SVG")
	f.StringVar(&o.profile, "profile", "", "keep the CPU profile of Culvert's bulk stream in this file")
	o.binaries.flags(f)
	return f
}

// quickMain is for the time of a cup of tea. Its exit status says whether the
// data path has the shape that it has to have.
func quickMain(ctx context.Context, args []string) error {
	o := options{rounds: 5, each: 800 * time.Millisecond, idle: 2000, paths: "direct,culvert,envoy"}
	if err := o.flags("quick").Parse(args); err != nil {
		return err
	}
	return run(ctx, o, quickWorks(o.each), true)
}

// fullMain measures every path by every work.
func fullMain(ctx context.Context, args []string) error {
	o := options{rounds: 8, each: 3 * time.Second, idle: 10000, paths: strings.Join(pathNames(), ","), raw: "out/bench/bench.json", charts: "out/bench"}
	if err := o.flags("full").Parse(args); err != nil {
		return err
	}
	return run(ctx, o, works(o.each), false)
}

func run(ctx context.Context, o options, list []work, shapes bool) (err error) {
	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.rounds(ctx, list); err != nil {
		return err
	}
	if err := b.report.show(os.Stdout); err != nil {
		return err
	}
	if o.charts != "" {
		if err := b.report.draw(o.charts); err != nil {
			return err
		}
	}
	if c := b.site("culvert"); shapes && o.only == "" && c != nil {
		return b.shapes(ctx, c)
	}
	return nil
}

// reportMain prints and draws what a run has kept.
func reportMain(_ context.Context, args []string) error {
	f := flag.NewFlagSet("report", flag.ContinueOnError)
	raw := f.String("raw", "out/bench/bench.json", "what a run has kept")
	charts := f.String("charts", "", "folder for charts, as SVG")
	if err := f.Parse(args); err != nil {
		return err
	}
	r, err := readReport(*raw)
	if err != nil {
		return err
	}
	if err := r.show(os.Stdout); err != nil || *charts == "" {
		return err
	}
	return r.draw(*charts)
}

func sweep(ctx context.Context) error {
	_, err := lab.Sweep(ctx, prefix)
	return err
}
