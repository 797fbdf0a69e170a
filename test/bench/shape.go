// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/pprof/profile"

	"github.com/culvert-mesh/culvert/admin"
)

// What the shape of the data path has to give.
const (
	minUsefulCPU  = 0.90    // system calls and AES-GCM in a profile of one bulk stream
	minSecondCPU  = 0.1     // of the busiest thread's work, by the second: a pair of pods is not held to one core
	maxBesideP99  = 3000    // us, of a small request beside a bulk stream
	minBulkKept   = 0.75    // of its rate, beside the small request
	maxIdleMemory = 3 << 10 // bytes per idle connection, both daemons together
)

var errShape = errors.New("a shape check does not hold")

func (b *bench) shapes(ctx context.Context, s *site) error {
	fmt.Println("\nshape of Culvert's data path")
	held := true
	check := func(ok bool, format string, args ...any) {
		mark := "✓"
		if !ok {
			mark, held = "✗", false
		}
		fmt.Printf("  %s %s\n", mark, fmt.Sprintf(format, args...))
	}
	calls, aes, err := b.profileBulk(ctx, s)
	if err != nil {
		return fmt.Errorf("profile of one bulk stream: %w", err)
	}
	check(calls+aes >= minUsefulCPU, "one bulk stream: %.1f %% of the daemons' CPU is system calls and AES-GCM (at least %.0f %%): system calls %.1f %%, AES-GCM %.1f %%",
		100*(calls+aes), 100*minUsefulCPU, 100*calls, 100*aes)
	second, err := s.spread(ctx, bulkWork(8, modeSink, b.each))
	if err != nil {
		return err
	}
	check(second >= minSecondCPU, "eight bulk streams of one pair of pods: the second thread of a daemon does %.0f %% of the first one's work (at least %.0f %%)", 100*second, 100*minSecondCPU)
	median := func(w work, m measure) float64 {
		for _, r := range b.report.rows() {
			if r.work == w.name && r.measure == m {
				return r.of[s.name].median
			}
		}
		return math.NaN()
	}
	one, many := median(requestWork(64, 1, 0), perUnit), median(requestWork(64, 32, 0), perUnit)
	check(many < one, "64 B requests: %.0f us of CPU each on 32 connections, %.0f us on one (fewer)", many, one)
	small, with := median(besideWork(0), p99), median(besideWork(0), bulk)
	check(small < maxBesideP99, "small request beside a bulk stream of the same pods: p99 %.0f us (under %d us)", small, maxBesideP99)
	alone := median(bulkWork(1, modeSink, 0), gbit)
	check(with >= minBulkKept*alone, "the bulk stream beside it keeps %.0f %% of its rate (at least %.0f %%)", 100*with/alone, 100*minBulkKept)
	for _, m := range b.report.Memory {
		if m.Work == idleWork && m.Path == s.name {
			check(m.Value < maxIdleMemory, "idle connection: %.0f bytes in both daemons together, over %d of them (under %d)", m.Value, b.idle, maxIdleMemory)
		}
	}
	if !held {
		return errShape
	}
	return nil
}

// spread is how much of the work of a daemon's busiest thread its second one does,
// of the daemon where that is less.
func (s *site) spread(ctx context.Context, w work) (float64, error) {
	before, err := s.threads()
	if err != nil {
		return 0, err
	}
	if _, err := s.take(ctx, w); err != nil {
		return 0, err
	}
	after, err := s.threads()
	if err != nil {
		return 0, err
	}
	least := 1.0
	for pid, threads := range after {
		var used []time.Duration
		for tid, t := range threads {
			used = append(used, t-before[pid][tid])
		}
		slices.Sort(used)
		if n := len(used); n > 1 {
			least = min(least, used[n-2].Seconds()/used[n-1].Seconds())
		}
	}
	return least, nil
}

// threads is the CPU time of each thread of each daemon.
func (s *site) threads() (map[int]map[string]time.Duration, error) {
	out := map[int]map[string]time.Duration{}
	for _, p := range s.proxies {
		out[p.pid] = map[string]time.Duration{}
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.pid))
		if err != nil {
			return nil, err
		}
		for _, t := range tasks {
			data, err := os.ReadFile(t)
			if err != nil {
				continue // the thread has ended
			}
			n, err := strconv.ParseInt(strings.Fields(string(data))[0], 10, 64)
			if err != nil {
				return nil, err
			}
			out[p.pid][t] = time.Duration(n)
		}
	}
	return out, nil
}

// profileBulk runs one bulk stream while the daemons are profiled, and returns the
// parts of their CPU time that went to system calls and to AES-GCM.
func (b *bench) profileBulk(ctx context.Context, s *site) (calls, aes float64, err error) {
	const length = 3
	l, err := s.begin(ctx, load{Mode: modeSink, Conns: 1, For: (length + 1) * time.Second})
	if err != nil {
		return 0, 0, err
	}
	defer l.close()
	all := make([]*profile.Profile, len(s.daemons))
	errs := make([]error, len(s.daemons))
	var fetches sync.WaitGroup
	for i, d := range s.daemons {
		fetches.Go(func() { all[i], errs[i] = fetchProfile(ctx, admin.Socket(d.RunDir()), length) })
	}
	fetches.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, 0, err
	}
	if _, err := l.wait(ctx); err != nil {
		return 0, 0, err
	}
	merged, err := profile.Merge(all)
	if err != nil {
		return 0, 0, err
	}
	if b.profile != "" {
		f, err := os.Create(b.profile)
		if err != nil {
			return 0, 0, err
		}
		defer f.Close()
		if err := merged.Write(f); err != nil {
			return 0, 0, err
		}
	}
	inCalls, inAES, total := divide(merged)
	if total == 0 {
		return 0, 0, errors.New("the profile is empty")
	}
	return float64(inCalls) / float64(total), float64(inAES) / float64(total), nil
}

// divide sorts a profile's samples by the function that the CPU was in.
func divide(p *profile.Profile) (calls, aes, total int64) {
	for _, s := range p.Sample {
		v := s.Value[len(s.Value)-1]
		total += v
		if len(s.Location) == 0 || len(s.Location[0].Line) == 0 {
			continue
		}
		name := s.Location[0].Line[0].Function.Name
		switch {
		case strings.Contains(name, "syscall.") && strings.Contains(name, "yscall6"), strings.Contains(name, "rawSyscall"), strings.Contains(name, "runtime/syscall"):
			calls += v
		case strings.Contains(name, "/aes"), strings.Contains(name, "gcm"):
			aes += v
		}
	}
	return calls, aes, total
}

func fetchProfile(ctx context.Context, sock string, seconds int) (*profile.Profile, error) {
	c := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", sock)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://admin/debug/pprof/profile?seconds=%d", seconds), nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("admin socket answers %s: %s", resp.Status, data)
	}
	return profile.ParseData(data)
}
