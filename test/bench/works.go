// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"
)

// work is what is measured of every path.
type work struct {
	name    string
	load    load
	unit    string                                       // what CPU time is given for: "GB", "request" or "connection"
	beside  bool                                         // while a bulk stream of the same two pods runs
	app     func(context.Context, *site) (result, error) // in place of load: a program of others
	targets map[measure]target
}

// measure is one figure of a work.
type measure string

const (
	gbit    measure = "Gbit/s"
	rate    measure = "per s"
	p50     measure = "p50, us"
	p99     measure = "p99, us"
	perGB   measure = "CPU s/GB"
	perUnit measure = "CPU us" // for each request or connection
	bulk    measure = "bulk, Gbit/s"
	atRest  measure = "MB"
	each    measure = "bytes"
)

// more says whether more of it is better.
func (m measure) more() bool { return m == gbit || m == rate || m == bulk }

// target is what Culvert's value is to be, by another path's: at least, where
// more is better, else at most. 0: nothing is asked.
type target struct{ envoy, ztunnel float64 }

var (
	bulkTargets    = map[measure]target{gbit: {1.5, 2.0}, perGB: {0.58, 0.45}}
	singleTargets  = map[measure]target{p50: {0.7, 0.65}, p99: {0.9, 0.9}}
	smallTargets   = map[measure]target{rate: {3, 2.5}, perUnit: {0.25, 0.33}, p99: {0.9, 0.9}}
	largeTargets   = map[measure]target{rate: {1.6, 2.2}, p99: {0.9, 0.9}}
	connectTargets = map[measure]target{rate: {4.5, 1.8}, perUnit: {0.15, 0.5}, p99: {0.9, 0.9}}
	besideTargets  = map[measure]target{p50: {1, 0.15}, p99: {1, 0.15}}
)

// fixedRate is below what any of the paths can do (requests per second).
const fixedRate = 2000

func bulkWork(streams int, mode byte, d time.Duration) work {
	name := "1 bulk stream"
	if streams > 1 {
		name = fmt.Sprintf("%d bulk streams", streams)
	}
	return work{
		name: name + map[byte]string{modeSink: " up", modeSource: " down"}[mode], unit: "GB",
		load: load{Mode: mode, Conns: streams, For: d}, targets: bulkTargets,
	}
}

func requestWork(size, conns int, d time.Duration) work {
	w := work{
		name: fmt.Sprintf("%d B requests, %d connections", size, conns), unit: "request",
		load: load{Mode: modeEcho, Conns: conns, Size: size, For: d},
	}
	if size >= 1<<10 {
		w.name = fmt.Sprintf("%d KB requests, %d connections", size>>10, conns)
	}
	switch {
	case conns == 1:
		w.name = w.name[:len(w.name)-1]
		if size == 64 {
			w.targets = singleTargets
		}
	case size == 64:
		w.targets = smallTargets
	case size == 16<<10 && conns == 32:
		w.targets = largeTargets
	}
	return w
}

func connectWork(d time.Duration) work {
	return work{
		name: "connect, request, close, 8 at once", unit: "connection",
		load: load{Mode: modeEcho, Conns: 8, Size: 64, Churn: true, For: d}, targets: connectTargets,
	}
}

func fixedWork(d time.Duration) work {
	return work{
		name: fmt.Sprintf("64 B requests, %d a second, 32 connections", fixedRate), unit: "request",
		load: load{Mode: modeEcho, Conns: 32, Size: 64, Rate: fixedRate, For: d},
	}
}

func besideWork(d time.Duration) work {
	return work{
		name: "64 B requests beside a bulk stream", unit: "request", beside: true,
		load: load{Mode: modeEcho, Conns: 1, Size: 64, For: d * 3 / 4}, targets: besideTargets,
	}
}

// works are all that there are. d is the length of one measurement.
func works(d time.Duration) []work {
	var all []work
	for _, streams := range []int{1, 8} {
		for _, mode := range []byte{modeSink, modeSource} {
			all = append(all, bulkWork(streams, mode, d))
		}
	}
	for _, size := range []int{64, 1 << 10, 16 << 10} {
		for _, conns := range []int{1, 32, 256} {
			all = append(all, requestWork(size, conns, d))
		}
	}
	return append(all, connectWork(d), fixedWork(d), besideWork(d))
}

// quickWorks are those with a target, but for some.
func quickWorks(d time.Duration) []work {
	return []work{
		bulkWork(1, modeSink, d), bulkWork(1, modeSource, d), bulkWork(8, modeSink, d),
		requestWork(64, 1, d), requestWork(64, 32, d), requestWork(64, 256, d), requestWork(16<<10, 32, d),
		connectWork(d), besideWork(d),
	}
}

// The figures of memory have no rounds: what a process has taken it does not give back.
const (
	restWork = "resident memory at rest, of node 1"
	idleWork = "memory of an idle connection, both ends"
)

var memoryTargets = map[string]map[measure]target{
	restWork: {atRest: {0.3, 0.9}},
	idleWork: {each: {0.05, 0.2}},
}
