// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// sample is one measurement.
type sample struct {
	Work  string `json:"work"`
	Path  string `json:"path"`
	Round int    `json:"round"`
	result
	CPU  time.Duration `json:"cpu"`            // of the proxies, user and system
	Bulk float64       `json:"bulk,omitempty"` // Gbit/s of the stream beside it
}

// take does a work once.
func (s *site) take(ctx context.Context, w work) (sample, error) {
	x := sample{Work: w.name, Path: s.name}
	var bulk *running
	if w.beside {
		var err error
		if bulk, err = s.begin(ctx, load{Mode: modeSink, Conns: 1, For: w.load.For * 4 / 3}); err != nil {
			return x, err
		}
		defer bulk.close()
	}
	before, err := s.cpu()
	if err != nil {
		return x, err
	}
	if w.app != nil {
		x.result, err = w.app(ctx, s)
	} else {
		x.result, err = s.do(ctx, w.load)
	}
	if err != nil {
		return x, err
	}
	after, err := s.cpu()
	if err != nil {
		return x, err
	}
	x.CPU = after - before
	if bulk != nil {
		r, err := bulk.wait(ctx)
		if err != nil {
			return x, err
		}
		x.Bulk = r.gbit()
	}
	return x, nil
}

func (r result) gbit() float64 { return float64(r.Bytes) * 8 / 1e9 / r.Elapsed.Seconds() }

// values are the figures of a sample, in the order of their rows.
func (s sample) values(unit string) []value {
	us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	if unit == "GB" {
		return []value{{gbit, s.gbit()}, {perGB, s.CPU.Seconds() / (float64(max(s.Bytes, 1)) / 1e9)}}
	}
	v := []value{{rate, float64(s.Ops) / s.Elapsed.Seconds()}, {p50, us(s.P50)}, {p99, us(s.P99)}}
	if s.Bulk > 0 {
		return append(v[1:], value{bulk, s.Bulk}) // the CPU time is the bulk stream's
	}
	return append(v, value{perUnit, us(s.CPU) / float64(max(s.Ops, 1))})
}

type value struct {
	measure measure
	value   float64
}

// cpu is what the proxies have used so far, threads that have ended included.
func (s *site) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, p := range s.proxies {
		var t unix.Timespec
		// A process's clock by its number: include/linux/posix-timers_types.h,
		// make_process_cpuclock with CPUCLOCK_SCHED.
		const sched = 2
		if err := unix.ClockGettime(int32(^p.pid<<3|sched), &t); err != nil {
			return 0, fmt.Errorf("read CPU time of process %d: %w", p.pid, err)
		}
		sum += time.Duration(t.Nano())
	}
	return sum, nil
}

// memory is the proxies' resident memory on a node, or on all for nil, in bytes.
// What is of files, their programs for the most part, counts once a node, by the
// process that has most: the pods of a node share it.
func (s *site) memory(n *lab.Node) (int64, error) {
	var own int64
	files := map[*lab.Node]int64{}
	for _, p := range s.proxies {
		if n != nil && p.node != n {
			continue
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(status)) {
			f := strings.Fields(line)
			if len(f) < 2 || !strings.HasPrefix(f[0], "Rss") {
				continue
			}
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, err
			}
			if f[0] == "RssFile:" {
				files[p.node] = max(files[p.node], kb<<10)
			} else { // RssAnon, RssShmem
				own += kb << 10
			}
		}
	}
	for _, b := range files {
		own += b
	}
	return own, nil
}

// idle is what one idle connection adds to the proxies' memory, at both ends.
func (s *site) idle(ctx context.Context, n int) (int64, error) {
	before, err := s.memory(nil)
	if err != nil {
		return 0, err
	}
	l, err := s.begin(ctx, load{Mode: modeEcho, Conns: n, Size: 64, Idle: true})
	if err != nil {
		return 0, err
	}
	defer l.close()
	if line, err := l.says.ReadString('\n'); err != nil || line != "open\n" {
		return 0, fmt.Errorf("open %d connections: %w", n, l.failed(ctx, err))
	}
	after, err := s.memory(nil)
	return (after - before) / int64(n), err
}
