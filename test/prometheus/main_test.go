// SPDX-License-Identifier: Apache-2.0

package prometheus

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/peer"
)

// prefix begins the names of all that these tests make.
const prefix = "culvert-prom"

// ztunnel is the daemon's binary, built by TestMain unless it is given.
var ztunnel string

func TestMain(m *testing.M) { os.Exit(lab.Main(prefix, &ztunnel, m.Run)) }

// program finds one of the system's.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		peer.Absent(t, "no "+name+" here: install the package prometheus ("+err.Error()+")")
	}
	return path
}

// env is a lab of two nodes with two pods each, and a daemon on both.
type env struct {
	*lab.Lab
	t       *testing.T
	ctx     context.Context
	daemons []*lab.Daemon
}

func setup(t *testing.T) *env {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute*lab.Slowness())
	t.Cleanup(cancel)
	l, err := lab.New(ctx, lab.Config{Nodes: 2, PodsPerNode: 2, Prefix: prefix})
	if err != nil {
		t.Fatal(err)
	}
	e := &env{Lab: l, t: t, ctx: ctx}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.Tails(10, "ztunnel.log"))
		}
		if err := l.Close(); err != nil {
			t.Errorf("close lab: %v", err)
		}
	})
	for _, n := range l.Nodes {
		d, err := n.StartDaemon(ctx, lab.DaemonConfig{Binary: ztunnel, Settings: map[string]any{
			"metrics": map[string]any{"address": "0.0.0.0:15020"}, // the lab asks at the loopback address, Prometheus at the node's
		}})
		e.must(err)
		e.daemons = append(e.daemons, d)
	}
	return e
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// connect connects from a pod, and exchanges text with an echo server.
func (e *env) connect(from *lab.Pod, to netip.AddrPort, text string) *net.TCPConn {
	e.t.Helper()
	c, err := from.Dial(e.ctx, to)
	e.must(err)
	e.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second * lab.Slowness()))
	e.must(lab.Exchange(c, text))
	return c
}

// server is a Prometheus that runs on the first node.
type server struct{ e *env }

const listen = "127.0.0.1:9090"

// prometheus starts one that scrapes both nodes, and waits until it answers.
func (e *env) prometheus() *server {
	e.t.Helper()
	binary := program(e.t, "prometheus")
	rules, err := filepath.Abs(rulesFile)
	e.must(err)
	config := "global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s}\n" +
		"rule_files: [" + rules + "]\n" +
		"scrape_configs:\n  - job_name: culvert\n    static_configs:\n"
	for _, n := range e.Nodes {
		config += fmt.Sprintf("      - {targets: ['%s:15020'], labels: {node: %s}}\n", n.Addrs[0], n.Name)
	}
	file := filepath.Join(e.Dir, "prometheus.yml")
	e.must(os.WriteFile(file, []byte(config), 0o600))
	log, err := os.Create(filepath.Join(e.Dir, "prometheus.log"))
	e.must(err)
	defer log.Close() // the child has its own
	cmd := exec.Command(binary, "--config.file="+file, "--storage.tsdb.path="+filepath.Join(e.Dir, "tsdb"), "--web.listen-address="+listen)
	cmd.Stdout, cmd.Stderr = log, log
	p, err := e.Nodes[0].Start(cmd)
	e.must(err)
	e.t.Cleanup(p.Kill)
	s := &server{e}
	err = lab.Until(e.ctx, "Prometheus is ready", func() error { _, err := s.get("/-/ready", nil); return err }, p.Ended)
	if err != nil {
		e.t.Fatalf("%v\n%s", err, lab.Tail(log.Name(), 10))
	}
	return s
}

func (s *server) get(path string, query url.Values) ([]byte, error) {
	return s.e.get(s.e.Nodes[0], "http://"+listen+path+"?"+query.Encode())
}

// get asks from a node.
func (e *env) get(from *lab.Node, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(e.ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := from.HTTPClient().Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return b, err
}

// query is the answer to a query: values by their labels, as name=value of those
// that are asked for.
func (s *server) query(q string, labels ...string) (map[string]float64, error) {
	b, err := s.get("/api/v1/query", url.Values{"query": {q}})
	if err != nil {
		return nil, fmt.Errorf("query %s: %w", q, err)
	}
	var answer struct {
		Data struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
			}
		}
	}
	if err := json.Unmarshal(b, &answer); err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for _, r := range answer.Data.Result {
		var key []string
		for _, l := range labels {
			key = append(key, r.Metric[l])
		}
		v, err := strconv.ParseFloat(r.Value[1].(string), 64)
		if err != nil {
			return nil, err
		}
		out[strings.Join(key, " ")] += v
	}
	return out, nil
}

// scrape is what a daemon says to who scrapes it.
func scrape(t *testing.T, e *env, d *lab.Daemon) string {
	t.Helper()
	text, err := e.get(d.Node, "http://127.0.0.1:15020/metrics")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
