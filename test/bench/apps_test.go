// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"
)

func TestParseWrk(t *testing.T) {
	const out = `Running 1s test @ http://127.0.0.1:8200/1k
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   812.52us  407.04us   7.64ms   90.18%
    Req/Sec    39.70k     3.28k   43.80k    80.00%
  Latency Distribution
     50%  742.00us
     75%    0.91ms
     90%    1.15ms
     99%    2.31ms
  39492 requests in 1.00s, 48.81MB read
Requests/sec:  39467.90
Transfer/sec:     48.78MB
`
	got, err := parseWrk(out)
	if want := (result{Ops: 39492, Elapsed: time.Second, P50: 742 * time.Microsecond, P99: 2310 * time.Microsecond}); err != nil || got != want {
		t.Errorf("read %+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", out + "  Socket errors: connect 0, read 3, write 0, timeout 0\n", out + "  Non-2xx or 3xx responses: 7\n"} {
		if r, err := parseWrk(bad); err == nil {
			t.Errorf("read %+v from %q", r, bad)
		}
	}
}

func TestParseRedis(t *testing.T) {
	const out = `WARNING: Could not fetch server CONFIG
"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"
"GET","20000.00","0.300","0.096","0.287","0.431","0.519","1.063"
`
	got, err := parseRedis(out, 10000)
	if want := (result{Ops: 10000, Elapsed: 500 * time.Millisecond, P50: 287 * time.Microsecond, P99: 519 * time.Microsecond}); err != nil || got != want {
		t.Errorf("read %+v, %v, want %+v", got, err, want)
	}
	if r, err := parseRedis("Could not connect to Redis", 1); err == nil {
		t.Errorf("read %+v from an error", r)
	}
}
