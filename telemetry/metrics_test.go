// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"bytes"
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/policy"
)

func testMetrics(t *testing.T) *Metrics {
	t.Helper()
	l := openLog(t, AccessLogConfig{Writer: io.Discard, Format: "json"})
	t.Cleanup(func() { l.Close() })
	return NewMetrics(MetricsConfig{
		Version:   "v1.2.3",
		Decisions: func() map[string]uint64 { return map[string]uint64{"outbound_marked": 7, "inbound_dropped": 0} },
		AccessLog: l,
	})
}

func TestMetricNamesKeepTheRulesOfPrometheus(t *testing.T) {
	m := testMetrics(t)
	c := sample()
	f := m.Opened(&c)
	m.Closed(&f, &c)
	problems, err := testutil.GatherAndLint(m.Registry())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestTrafficCounters(t *testing.T) {
	m := testMetrics(t)
	c := sample()
	long := m.Opened(&c)
	long.Progress(100, 1000)
	long.Progress(100, 1000) // nothing new
	short := m.Opened(&c)
	m.Closed(&short, &c) // 120 and 4096 bytes
	m.Closed(&short, &c) // a handle closes once
	long.Progress(150, 1500)
	denied := refused()
	m.Closed(nil, &denied)
	m.Closed(&Flow{}, &denied)

	const labels = `{connection_security_policy="mutual_tls",destination_principal="spiffe://cluster.local/ns/demo/sa/web",destination_workload="web",destination_workload_namespace="demo",` +
		`reporter="source",source_principal="spiffe://cluster.local/ns/demo/sa/client",source_workload="client",source_workload_namespace="demo"}`
	want := `
# HELP istio_tcp_connections_closed_total Connections of applications that were let through and have ended.
# TYPE istio_tcp_connections_closed_total counter
istio_tcp_connections_closed_total` + labels + ` 1
# HELP istio_tcp_connections_opened_total Connections of applications that were let through.
# TYPE istio_tcp_connections_opened_total counter
istio_tcp_connections_opened_total` + labels + ` 2
# HELP istio_tcp_received_bytes_total Bytes received from the client, by the destination.
# TYPE istio_tcp_received_bytes_total counter
istio_tcp_received_bytes_total` + labels + ` 270
# HELP istio_tcp_sent_bytes_total Bytes sent by the destination, to the client.
# TYPE istio_tcp_sent_bytes_total counter
istio_tcp_sent_bytes_total` + labels + ` 5596
`
	err := testutil.GatherAndCompare(m.Registry(), strings.NewReader(want),
		"istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total", "istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total")
	if err != nil {
		t.Error(err)
	}
	for key, want := range map[closedKey]float64{
		{ReporterSource, ReasonOK}:          2,
		{ReporterDestination, ReasonDenied}: 2,
		{ReporterDestination, ReasonOK}:     0,
	} {
		if got := testutil.ToFloat64(m.closed[key]); got != want {
			t.Errorf("%v: %v, want %v", key, got, want)
		}
	}
}

func TestEveryReasonHasItsSeriesFromTheStart(t *testing.T) {
	m := testMetrics(t)
	body := scrape(t, m)
	for _, reporter := range []string{"source", "destination"} {
		for _, reason := range Reasons() {
			if want := fmt.Sprintf("culvert_connections_closed_total{reason=%q,reporter=%q} 0\n", reason, reporter); !strings.Contains(body, want) {
				t.Errorf("no %s", want)
			}
		}
		for _, reason := range identity.Reasons() {
			if want := fmt.Sprintf("mtls_handshake_failure_total{reason=%q,reporter=%q} 0\n", reason, reporter); !strings.Contains(body, want) {
				t.Errorf("no %s", want)
			}
		}
	}
	for _, want := range []string{
		"mtls_handshake_success_total 0\n",
		"mtls_handshake_duration_seconds_count 0\n",
		`culvert_redirect_decisions_total{decision="outbound_marked"} 7` + "\n",
		`culvert_redirect_decisions_total{decision="inbound_dropped"} 0` + "\n",
		"culvert_access_log_dropped_total 0\n",
		"culvert_access_log_lines_total 0\n",
		`version="v1.2.3"} 1` + "\n",
		"go_goroutines ",
		"process_open_fds ",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s", want)
		}
	}
}

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler(nil).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestHandshakes(t *testing.T) {
	m := testMetrics(t)
	m.Handshake(Handshake{Reporter: ReporterSource, Duration: 3 * time.Millisecond})
	m.Handshake(Handshake{Reporter: ReporterDestination, Reason: string(identity.ReasonRevoked), Duration: time.Second})
	body := scrape(t, m)
	for _, want := range []string{
		"mtls_handshake_success_total 1\n",
		`mtls_handshake_failure_total{reason="revoked",reporter="destination"} 1` + "\n",
		`mtls_handshake_duration_seconds_bucket{le="0.002"} 0` + "\n",
		`mtls_handshake_duration_seconds_bucket{le="0.005"} 1` + "\n",
		"mtls_handshake_duration_seconds_count 1\n",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s", want)
		}
	}
}

func TestAReasonThatIsNotListedMakesOneSeries(t *testing.T) {
	m := testMetrics(t)
	for i := range 3 {
		m.Closed(nil, &Connection{Direction: policy.Inbound, Reason: Reason(fmt.Sprint(i))})
	}
	if got := testutil.ToFloat64(m.unlisted[ReporterDestination]); got != 3 {
		t.Errorf("got %v", got)
	}
}

// 10,000 peers, each with its connection, and the series stay below the bound:
// those that do not fit are counted together.
func TestSeriesAreBounded(t *testing.T) {
	const peers = 10_000
	m := testMetrics(t)
	churn := func(from int) {
		c := sample()
		for i := range peers {
			c.Src.Workload = fmt.Sprint("peer-", from+i)
			c.Src.Identity = spiffeid.RequireFromString("spiffe://cluster.local/ns/demo/sa/" + c.Src.Workload)
			f := m.Opened(&c)
			m.Closed(&f, &c)
		}
	}
	check := func(rest float64) {
		t.Helper()
		for _, v := range []*prometheus.CounterVec{m.traffic.opened, m.traffic.closed, m.traffic.sent, m.traffic.received} {
			if got := count(v); got != maxSeries+1 {
				t.Errorf("%d series, want %d and one for the rest", got, maxSeries)
			}
		}
		other := m.traffic.opened.WithLabelValues("source", "other", "other", "unknown", "other", "other", "unknown", "mutual_tls")
		if got := testutil.ToFloat64(other); got != rest {
			t.Errorf("%v connections are among the rest, want %v", got, rest)
		}
	}
	churn(0)
	check(peers - maxSeries)
	churn(0) // the same again: those that have a series keep it
	check(2 * (peers - maxSeries))
	churn(peers) // others
	check(2*(peers-maxSeries) + peers)
}

// count is how many series a metric has.
func count(c prometheus.Collector) int {
	ch := make(chan prometheus.Metric, 2*maxSeries)
	c.Collect(ch)
	return len(ch)
}

// Where there is no room, those make some that had no connection for long, some at a
// time. One that is open is never taken away.
func TestSeriesOfTheGoneMakeRoom(t *testing.T) {
	m := testMetrics(t)
	old := sample()
	for i := range maxSeries {
		old.Src.Workload = fmt.Sprint("old-", i)
		f := m.Opened(&old)
		if i > 0 { // the first one stays open
			m.Closed(&f, &old)
		}
	}
	open := sample()
	open.Src.Workload = "old-0"
	late := sample()
	late.Start = late.Start.Add(idleSeries / 2)
	late.Src.Workload = "too soon"
	m.Opened(&late)
	if got := count(m.traffic.opened); got != maxSeries+1 {
		t.Fatalf("%d series after half the time, want %d and one for the rest", got, maxSeries)
	}
	late.Start = late.Start.Add(idleSeries)
	late.Src.Workload = "new"
	f := m.Opened(&late)
	if got, want := count(m.traffic.opened), maxSeries+1-sweepShare+1; got != want {
		t.Errorf("%d series after the time, want %d: a share of the old ones has gone", got, want)
	}
	for i := range maxSeries - 3 { // all but the open one, the new one, and that for the rest
		late.Src.Workload = fmt.Sprint("new-", i)
		m.Opened(&late)
	}
	if got := count(m.traffic.opened); got != maxSeries {
		t.Errorf("%d series after as many new ones, want %d", got, maxSeries)
	}
	other := m.traffic.opened.WithLabelValues("source", "other", "other", "unknown", "other", "other", "unknown", "mutual_tls")
	if got := testutil.ToFloat64(other); got != 1 {
		t.Errorf("%v connections are among the rest, want the one that came too soon", got)
	}
	if got := testutil.ToFloat64(f.series.opened); got != 1 {
		t.Errorf("the new one has %v connections", got)
	}
	if f := m.Opened(&open); testutil.ToFloat64(f.series.opened) != 2 {
		t.Error("the open connection's series has begun again")
	}
}

// A peer may claim any name. It makes no series.
func TestClaimedNamesMakeNoSeries(t *testing.T) {
	m := testMetrics(t)
	c := sample()
	for _, c.Src.Claimed = range []bool{true, false} {
		before := testutil.CollectAndCount(m.traffic.opened)
		for i := range 10 {
			c.Src.Workload = fmt.Sprint(i)
			m.Opened(&c)
		}
		n, want := testutil.CollectAndCount(m.traffic.opened)-before, 10 // the control
		if c.Src.Claimed {
			want = 1
		}
		if n != want {
			t.Errorf("10 names, claimed: %v, make %d series, want %d", c.Src.Claimed, n, want)
		}
	}
}

func TestSeriesFromManyLoops(t *testing.T) {
	const loops, each = 4, 500
	m := testMetrics(t)
	var wg sync.WaitGroup
	for range loops {
		wg.Go(func() {
			for i := range each {
				c := sample()
				c.Src.Workload = fmt.Sprint(i)
				f := m.Opened(&c)
				m.Closed(&f, &c)
			}
		})
	}
	wg.Wait()
	if got := testutil.CollectAndCount(m.traffic.opened); got != each {
		t.Errorf("%d series", got)
	}
	if got := testutil.ToFloat64(m.closed[closedKey{ReporterSource, ReasonOK}]); got != loops*each {
		t.Errorf("%v closed", got)
	}
}

func TestRecorderSendsToBoth(t *testing.T) {
	var buf bytes.Buffer
	l := openLog(t, AccessLogConfig{Writer: &buf, Format: "json"})
	r := &Recorder{Metrics: NewMetrics(MetricsConfig{AccessLog: l}), Log: l}
	c := sample()
	f := r.Opened(&c)
	r.Closed(&f, &c)
	r.Handshake(Handshake{Reporter: ReporterSource})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(appendJSON(nil, &c)), buf.String()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if got := testutil.ToFloat64(r.Metrics.handshakes); got != 1 {
		t.Errorf("%v handshakes", got)
	}
	var none *Recorder
	f = none.Opened(&c)
	none.Closed(&f, &c)
	none.Handshake(Handshake{})
}

func TestParseReason(t *testing.T) {
	for _, r := range Reasons() {
		if got, ok := ParseReason(string(r)); !ok || got != r {
			t.Errorf("%s: %s, %t", r, got, ok)
		}
	}
	for _, s := range []string{"", "OK", "unlisted", "ok "} {
		if got, ok := ParseReason(s); ok {
			t.Errorf("%q is %s", s, got)
		}
	}
}

// BenchmarkFlow is what an event loop pays for the counters of a connection.
func BenchmarkFlow(b *testing.B) {
	m := NewMetrics(MetricsConfig{})
	c := sample()
	b.ReportAllocs()
	for b.Loop() {
		f := m.Opened(&c)
		m.Closed(&f, &c)
	}
}
