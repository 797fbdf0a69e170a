// SPDX-License-Identifier: Apache-2.0

// Bench measures Culvert beside direct TCP: two nodes, a daemon on each, two
// pods that are enrolled and two that are not, the same work on both pairs in
// interleaved rounds, so that a machine that drifts hits all alike. It prints
// medians, ratios, what the daemons' CPUs spent, and four checks of the shape
// that the data path has to have. Its exit status says whether they hold.
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
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

func main() {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "serve":
		err = serveMain()
	case len(os.Args) > 1 && os.Args[1] == "load":
		err = loadMain(os.Args[2:])
	default:
		err = benchMain()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// prefix begins the names of all that a bench makes.
const prefix = "culvert-bench"

var errShape = errors.New("a shape check does not hold")

func benchMain() error {
	ztunnel := flag.String("ztunnel", "bin/ztunnel", "the daemon's binary")
	rounds := flag.Int("rounds", 5, "interleaved rounds")
	each := flag.Duration("for", 1200*time.Millisecond, "length of one measurement")
	idle := flag.Int("idle", 4000, "idle connections for the memory check")
	only := flag.String("only", "", "run the works whose name contains this")
	profile := flag.String("profile", "", "keep the CPU profile of the bulk stream in this file")
	flag.Bool("quick", true, "accepted for the Makefile's sake")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if _, err := lab.Sweep(ctx, prefix); err != nil {
		return err
	}
	b, err := newBench(ctx, *ztunnel)
	if err != nil {
		return err
	}
	defer b.close()
	b.each, b.keepProfile = *each, *profile
	fmt.Printf("%s, Linux %s, %d CPUs, %s\n", cpuModel(), kernel(), runtime.NumCPU(), runtime.Version())
	fmt.Printf("direct TCP beside Culvert, %d interleaved rounds of %v, medians; CPU is that of both daemons\n\n", *rounds, *each)
	return b.run(ctx, *rounds, *idle, *only)
}

func cpuModel() string {
	data, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(data)) {
		if name, ok := strings.CutPrefix(line, "model name"); ok {
			return strings.TrimSpace(strings.TrimLeft(name, "\t :"))
		}
	}
	return "unknown CPU"
}

func kernel() string {
	var u syscall.Utsname
	if syscall.Uname(&u) != nil {
		return "unknown"
	}
	var b strings.Builder
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		b.WriteByte(byte(c))
	}
	return b.String()
}
