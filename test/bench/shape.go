// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/pprof/profile"
)

// What the shape of the data path has to give.
const (
	minUsefulCPU  = 0.90                 // system calls and AES-GCM in a profile of one bulk stream
	maxBesideP99  = 3 * time.Millisecond // a small request beside a bulk stream
	minBulkKept   = 0.75                 // of its rate, beside the small request
	maxIdleMemory = 3 << 10              // bytes per idle connection, both daemons together
)

func (b *bench) shapes(rows map[string]row, beside []besides, idle int, only string) error {
	fmt.Println("\nshape checks")
	held := true
	check := func(ok bool, format string, args ...any) {
		mark := "✓"
		if !ok {
			mark, held = "✗", false
		}
		fmt.Printf("  %s %s\n", mark, fmt.Sprintf(format, args...))
	}
	useful, parts, err := b.profileBulk()
	if err != nil {
		return fmt.Errorf("profile of one bulk stream: %w", err)
	}
	check(useful >= minUsefulCPU, "one bulk stream: %.1f %% of the daemons' CPU is system calls and AES-GCM (at least %.0f %%): %s", 100*useful, 100*minUsefulCPU, parts)
	if one, many := rows["64 B, 1 connection"].cpuPerOp, rows["64 B, 32 connections"].cpuPerOp; one > 0 {
		check(many < one, "64 B messages: %d us of CPU each on 32 connections, %d us on one (fewer)", many.Microseconds(), one.Microseconds())
	}
	small := besideSummary(beside)
	check(small.p99 < maxBesideP99, "small request beside a bulk stream of the same pods: p50 %d us, p99 %d us (under %v)", small.p50.Microseconds(), small.p99.Microseconds(), maxBesideP99)
	check(small.with >= minBulkKept, "the bulk stream beside it keeps %.0f %% of its rate (at least %.0f %%)", 100*small.with, 100*minBulkKept)
	if only == "" {
		per, err := b.idleMemory(idle)
		if err != nil {
			return fmt.Errorf("memory of idle connections: %w", err)
		}
		check(per < maxIdleMemory, "idle connection: %d bytes in both daemons together, over %d of them (under %d)", per, idle, maxIdleMemory)
	}
	if !held {
		return errShape
	}
	return nil
}

// profileBulk runs one bulk stream while both daemons are profiled.
func (b *bench) profileBulk() (useful float64, parts string, err error) {
	const length = 3
	wait, in, _, err := b.begin(b.culvert, load{Mode: modeSink, Conns: 1, For: (length + 1) * time.Second})
	if err != nil {
		return 0, "", err
	}
	defer in.Close()
	type got struct {
		p   *profile.Profile
		err error
	}
	results := make(chan got, len(b.daemons))
	for i := range b.daemons {
		sock := filepath.Join(b.daemons[i].RunDir(), "admin.sock")
		go func() {
			p, err := fetchProfile(sock, length)
			results <- got{p, err}
		}()
	}
	var all []*profile.Profile
	for range b.daemons {
		g := <-results
		if g.err != nil {
			return 0, "", g.err
		}
		all = append(all, g.p)
	}
	if _, err := wait(); err != nil {
		return 0, "", err
	}
	merged, err := profile.Merge(all)
	if err != nil {
		return 0, "", err
	}
	if b.keepProfile != "" {
		f, err := os.Create(b.keepProfile)
		if err != nil {
			return 0, "", err
		}
		defer f.Close()
		if err := merged.Write(f); err != nil {
			return 0, "", err
		}
	}
	calls, aes, total := divide(merged)
	if total == 0 {
		return 0, "", fmt.Errorf("the profile is empty")
	}
	return float64(calls+aes) / float64(total), fmt.Sprintf("system calls %.1f %%, AES-GCM %.1f %%", 100*float64(calls)/float64(total), 100*float64(aes)/float64(total)), nil
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

func fetchProfile(sock string, seconds int) (*profile.Profile, error) {
	c := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", sock)
	}}}
	resp, err := c.Get(fmt.Sprintf("http://admin/debug/pprof/profile?seconds=%d", seconds))
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

// idleMemory is what one idle connection adds to the daemons' resident memory.
func (b *bench) idleMemory(n int) (int64, error) {
	b.progress("%d idle connections", n)
	defer b.progress("")
	before, err := b.rss()
	if err != nil {
		return 0, err
	}
	wait, in, out, err := b.begin(b.culvert, load{Mode: modeEcho, Conns: n, Size: 64, Idle: true})
	if err != nil {
		return 0, err
	}
	defer in.Close()
	if line, err := out.ReadString('\n'); err != nil || line != "open\n" {
		_, err = wait()
		return 0, fmt.Errorf("open %d connections: %q: %w", n, line, err)
	}
	after, err := b.rss()
	if err != nil {
		return 0, err
	}
	return (after - before) / int64(n), nil
}
