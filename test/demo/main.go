// SPDX-License-Identifier: Apache-2.0

// Command demo shows Culvert at work on this machine: two nodes with two pods each, made of network namespaces, a
// ztunnel per node, real traffic, and the proof, part of it from a capture between the nodes that shares nothing with
// Culvert. Each line says whether it holds; the exit status is 1 when one does not, 2 when the demo could not be run.
//
// It removes what it makes, also on Ctrl-C, and what a killed run has left. `make demo` builds it and runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-mesh/culvert/internal/cli"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// patience bounds everything up to the report; the run takes a few seconds.
const patience = 45 * time.Second

const (
	exitHolds = iota
	exitBroken
	exitCannotRun
)

func main() {
	var o options
	flag.StringVar(&o.ztunnel, "ztunnel", "bin/ztunnel", "the `binary` to show")
	flag.BoolVar(&o.keep, "keep", false, "leave all of it running after the report, until Ctrl-C")
	flag.StringVar(&o.pcap, "pcap", "", "write what crossed between the nodes, with the mesh on, to this `file`")
	flag.StringVar(&o.prefix, "prefix", "culvert-demo", "how the names of the namespaces begin; an earlier run with the same `prefix` is cleaned up after")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "Two nodes, two pods each, a ztunnel per node, and the proof. Needs root.\n\n"+
			"  make demo                      build everything and run it\n"+
			"  make demo DEMOFLAGS=-keep      and leave it running to look around\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends it at once; the next run then cleans up
	signal.Ignore(syscall.SIGPIPE)
	code, err := run(ctx, os.Stdout, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
	}
	os.Exit(code)
}

type options struct {
	ztunnel, pcap, prefix string
	keep                  bool
}

// run is the whole demo. What it has made is gone when it returns.
func run(ctx context.Context, w io.Writer, o options) (code int, err error) {
	if os.Geteuid() != 0 {
		return exitCannotRun, errors.New("this step makes network namespaces and loads BPF programs, which needs root: " +
			"use `make demo`, which builds as you and asks sudo for this step only, or `sudo bin/demo`")
	}
	if _, err := os.Stat(o.ztunnel); err != nil {
		return exitCannotRun, fmt.Errorf("%w: build it with `make build`, or name it with -ztunnel", err)
	}
	begin := time.Now()
	setUp, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not done within %s", patience))
	defer cancel()

	removed, err := lab.Sweep(setUp, o.prefix)
	if len(removed) > 0 {
		fmt.Fprintf(w, "Removed what an earlier run has left: %s\n", strings.Join(removed, ", "))
	}
	if err != nil { // another run's remains are in nobody's way, but they are there
		fmt.Fprintf(w, "Warning: %v\n", err)
	}

	s, err := newStage(setUp, o)
	if err != nil {
		return exitCannotRun, err
	}
	defer func() {
		if closeErr := s.close(); closeErr != nil {
			code, err = max(code, exitBroken), errors.Join(err, fmt.Errorf("clean up: %w", closeErr))
		} else {
			fmt.Fprintln(w, "Everything that the demo made is removed.")
		}
	}()
	s.introduce(w)

	fmt.Fprintln(w, "\nThe same traffic twice: first with the mesh off, as the control, then with it on …")
	off := s.exchange(setUp, "")
	daemons := s.startDaemons(setUp)
	var on outcome
	if daemons == nil {
		on = s.exchange(setUp, o.pcap)
	}
	if err := ctx.Err(); err != nil {
		return exitCannotRun, errors.New("interrupted")
	}

	r := cli.NewReport(w, 34)
	s.report(setUp, r, off, on, daemons)
	if failed := r.Failed(); len(failed) > 0 {
		code = exitBroken
		r.Text("\n%d of %d lines do not hold: %s.", len(failed), r.Lines(), strings.Join(failed, "; "))
		s.logs(w)
	} else {
		r.Text("\nAll %d lines hold. It took %.1f s.", r.Lines(), time.Since(begin).Seconds())
	}
	if !o.keep {
		r.Text("To look around yourself: make demo DEMOFLAGS=-keep\n")
		return code, nil
	}
	s.invite(w)
	<-ctx.Done()
	fmt.Fprintln(w)
	return code, nil
}
