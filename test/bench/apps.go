// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// Where the applications listen, beside the bench's own server.
const (
	nginxPort = 8200
	redisPort = 8201
)

// appPrograms are those of the system that the applications' bench needs.
var appPrograms = []string{"nginx", "wrk", "redis-server", "redis-benchmark"}

// appsMain measures real applications under real load generators.
func appsMain(ctx context.Context, args []string) error {
	o := options{rounds: 5, each: 2 * time.Second, paths: "direct,culvert,envoy,ztunnel,haproxy", raw: "out/bench/apps.json", charts: "out/bench/apps"}
	if err := o.flags("apps").Parse(args); err != nil {
		return err
	}
	for _, p := range appPrograms {
		if _, err := find(p); err != nil {
			return fmt.Errorf("install the packages nginx-light, wrk, redis-server and redis-tools: %w", err)
		}
	}
	o.setUp = startApps
	return run(ctx, o, appWorks(o.each), false)
}

// startApps starts the servers in a site's server pod.
func startApps(ctx context.Context, s *site) error {
	dir := filepath.Join(s.lab.Dir, "apps")
	pages := filepath.Join(dir, "pages")
	if err := os.MkdirAll(pages, 0o755); err != nil {
		return err
	}
	for name, size := range map[string]int{"1k": 1 << 10, "64k": 64 << 10} {
		if err := os.WriteFile(filepath.Join(pages, name), bytes.Repeat([]byte("x"), size), 0o644); err != nil {
			return err
		}
	}
	conf := filepath.Join(dir, "nginx.conf")
	err := os.WriteFile(conf, fmt.Appendf(nil, `daemon off;
user root;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events { worker_connections 4096; }
http {
	access_log off;
	sendfile on;
	keepalive_requests 1000000000;
	server { listen %d; root %s; }
}
`, nginxPort, pages), 0o644)
	if err != nil {
		return err
	}
	for port, argv := range map[uint16][]string{
		nginxPort: {"nginx", "-p", dir, "-e", "stderr", "-c", conf},
		redisPort: {"redis-server", "--port", fmt.Sprint(redisPort), "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", dir},
	} {
		cmd := exec.Command(argv[0], argv[1:]...)
		proc, err := s.open(s.server, cmd)
		if err != nil {
			return err
		}
		if err := s.listens(ctx, s.server, proc, port); err != nil {
			return err
		}
	}
	return nil
}

// appWorks are what the load generators do. d is the length of one measurement,
// as far as they can be told.
func appWorks(d time.Duration) []work {
	const conns = 32
	wrk := func(name, page string, more ...string) work {
		return work{name: name, unit: "request", app: func(ctx context.Context, s *site) (result, error) {
			args := append([]string{"-t", "1", "-c", fmt.Sprint(conns), "-d", fmt.Sprint(max(1, int(d.Seconds()))), "--latency"}, more...)
			out, err := s.output(ctx, s.client, "wrk", append(args, "http://"+netip.AddrPortFrom(s.server.V4, nginxPort).String()+page)...)
			if err != nil {
				return result{}, err
			}
			return parseWrk(out)
		}}
	}
	redis := func(name string, test string, more ...string) work {
		return work{name: name, unit: "request", app: func(ctx context.Context, s *site) (result, error) {
			// It counts requests, not time: some thousand a second is what all paths can do.
			n := max(1000, int(d.Seconds()*10000))
			args := append([]string{
				"-h", s.server.V4.String(), "-p", fmt.Sprint(redisPort), "-c", fmt.Sprint(conns), "-n", fmt.Sprint(n), "-d", "64", "-t", test, "--csv",
			}, more...)
			out, err := s.output(ctx, s.client, "redis-benchmark", args...)
			if err != nil {
				return result{}, err
			}
			return parseRedis(out, n)
		}}
	}
	return []work{
		wrk("nginx, 1 KB, 32 connections", "/1k"),
		wrk("nginx, 64 KB, 32 connections", "/64k"),
		wrk("nginx, 1 KB, a connection for each request", "/1k", "-H", "Connection: close"),
		redis("redis, GET of 64 B, 32 connections", "get"),
		redis("redis, SET of 64 B, 32 connections", "set"),
		redis("redis, GET of 64 B, 16 in one go, 32 connections", "get", "-P", "16"),
	}
}

// output runs a command in a pod.
func (s *site) output(ctx context.Context, p *lab.Pod, name string, args ...string) (string, error) {
	const patience = 2 * time.Minute
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd, out := exec.Command(name, args...), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, out
	proc, err := p.Start(cmd)
	if err != nil {
		return "", err
	}
	if err := proc.Wait(ctx); err != nil {
		proc.Kill()
		return "", fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out.Bytes()))
	}
	return out.String(), nil
}

var (
	wrkTotal  = regexp.MustCompile(`(\d+) requests in ([\d.]+\w+)`)
	wrkMedian = regexp.MustCompile(`(?m)^\s+50%\s+(\S+)`)
	wrkTail   = regexp.MustCompile(`(?m)^\s+99%\s+(\S+)`)
	wrkErrors = regexp.MustCompile(`(?m)(Socket errors|Non-2xx).*$`)
)

// parseWrk reads what wrk prints with --latency.
func parseWrk(out string) (result, error) {
	var r result
	if e := wrkErrors.FindString(out); e != "" {
		return r, fmt.Errorf("wrk: %s", e)
	}
	total, median, tail := wrkTotal.FindStringSubmatch(out), wrkMedian.FindStringSubmatch(out), wrkTail.FindStringSubmatch(out)
	if total == nil || median == nil || tail == nil {
		return r, fmt.Errorf("wrk: %q", out)
	}
	var err error
	if r.Ops, err = strconv.Atoi(total[1]); err != nil {
		return r, err
	}
	for to, text := range map[*time.Duration]string{&r.Elapsed: total[2], &r.P50: median[1], &r.P99: tail[1]} {
		if *to, err = time.ParseDuration(text); err != nil {
			return r, err
		}
	}
	return r, nil
}

// parseRedis reads what redis-benchmark prints with --csv.
func parseRedis(out string, n int) (result, error) {
	r := result{Ops: n}
	at := strings.Index(out, `"test",`)
	if at < 0 {
		return r, fmt.Errorf("redis-benchmark: %q", out)
	}
	rows, err := csv.NewReader(strings.NewReader(out[at:])).ReadAll()
	if err != nil || len(rows) < 2 {
		return r, fmt.Errorf("redis-benchmark: %w: %q", err, out)
	}
	values := map[string]float64{}
	for i, name := range rows[0][1:] {
		if values[name], err = strconv.ParseFloat(rows[1][i+1], 64); err != nil {
			return r, err
		}
	}
	if values["rps"] <= 0 {
		return r, fmt.Errorf("redis-benchmark: no rate in %q", out)
	}
	ms := func(name string) time.Duration { return time.Duration(values[name] * float64(time.Millisecond)) }
	r.Elapsed = time.Duration(float64(n) / values["rps"] * float64(time.Second))
	r.P50, r.P99 = ms("p50_latency_ms"), ms("p99_latency_ms")
	return r, nil
}
