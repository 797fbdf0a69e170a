// SPDX-License-Identifier: Apache-2.0

package prometheus

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// A Prometheus that scrapes both nodes answers with what was carried between them.
func TestPrometheusAnswersWithWhatWasCarried(t *testing.T) {
	e := setup(t)
	s := e.prometheus()
	one, two := e.Pod(1, 1), e.Pod(2, 1)
	app, err := two.Echo(8080)
	e.must(err)
	const pair = `{source_workload="pod1-1",source_workload_namespace="demo",source_principal="spiffe://cluster.local/ns/demo/sa/sa1-1",` +
		`destination_workload="pod2-1",destination_workload_namespace="demo",destination_principal="spiffe://cluster.local/ns/demo/sa/sa2-1",` +
		`connection_security_policy="mutual_tls"}`

	wants := func(q string, want map[string]float64, labels ...string) {
		t.Helper()
		if err := lab.Until(e.ctx, q, func() error {
			got, err := s.query(q, labels...)
			if err != nil {
				return err
			}
			if !maps.Equal(got, want) {
				return fmt.Errorf("answers %v, want %v", got, want)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	wants("up", map[string]float64{"node1": 1, "node2": 1}, "node")
	wants("istio_tcp_connections_opened_total"+pair, map[string]float64{}, "reporter") // the control: nothing was carried yet

	const size, connections = 10_000, 7
	text := strings.Repeat("culvert!!!", size/10)
	for i := range connections {
		c := e.connect(one, app.Addr(4+2*(i%2)), text)
		if i > 0 { // the first stays open
			e.must(c.CloseWrite())
		}
	}
	if _, err := one.Dial(e.ctx, netip.MustParseAddrPort("10.77.9.9:80")); err == nil {
		t.Error("an address that nobody has was connected to")
	}
	sides := func(n float64) map[string]float64 { return map[string]float64{"source": n, "destination": n} }
	wants("istio_tcp_connections_opened_total"+pair, sides(connections), "reporter")
	wants("istio_tcp_connections_closed_total"+pair, sides(connections-1), "reporter")
	wants("istio_tcp_received_bytes_total"+pair, sides(connections*size), "reporter")
	wants("istio_tcp_sent_bytes_total"+pair, sides(connections*size), "reporter")
	wants("count by (node) (istio_tcp_received_bytes_total)", map[string]float64{"node1": 1, "node2": 1}, "node") // no other pair
	wants(`culvert_connections_closed_total{reason="ok"} > 0`, map[string]float64{"source": connections - 1, "destination": connections - 1}, "reporter")

	// One session for each family, and the connection that is open.
	wants("sum by (node, role) (culvert_sessions) > 0", map[string]float64{"node1 client": 2, "node2 server": 2}, "node", "role")
	wants("sum by (node, kind) (culvert_open_connections) > 0", map[string]float64{"node1 outbound": 1, "node2 inbound": 1}, "node", "kind")
	wants("mtls_handshake_success_total", map[string]float64{"node1": 2, "node2": 2}, "node")
	wants("mtls_handshake_duration_seconds_count", map[string]float64{"node1": 2, "node2": 2}, "node")
	wants("sum by (node) (mtls_handshake_failure_total)", map[string]float64{"node1": 0, "node2": 0}, "node")
	wants(`culvert_redirect_decisions_total{decision="connect_refused_unknown"}`, map[string]float64{"node1": 1, "node2": 0}, "node")

	// Certificates of a day, each with its series.
	want := map[string]float64{}
	for _, p := range e.Pods() {
		want[p.Node.Name+" spiffe://cluster.local/ns/demo/sa/"+p.ServiceAccount] = 1
	}
	wants("(certificate_expiration_seconds > bool 0) * (certificate_expiration_seconds < bool 86400)", want, "node", "identity")
	wants("culvert_issuer_expiration_seconds > bool 86400", map[string]float64{"node1": 1, "node2": 1}, "node")

	// Loops turn, and use time.
	wants("sum by (node) (culvert_loop_turns_total) > bool 10", map[string]float64{"node1": 1, "node2": 1}, "node")
	wants("sum by (node) (culvert_loop_cpu_seconds_total) > bool 0", map[string]float64{"node1": 1, "node2": 1}, "node")

	// A handshake that fails is counted, with its reason.
	knock(e, two)
	wants(`mtls_handshake_failure_total > 0`, map[string]float64{"node2 destination tls_protocol": 1}, "node", "reporter", "reason")

	// It has taken the rules.
	b, err := s.get("/api/v1/rules", nil)
	e.must(err)
	var rules struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Health string }
			}
		}
	}
	e.must(json.Unmarshal(b, &rules))
	taken := 0
	for _, g := range rules.Data.Groups {
		for _, r := range g.Rules {
			if taken++; r.Health == "err" {
				t.Errorf("rule %s cannot be evaluated", r.Name)
			}
		}
	}
	if taken == 0 {
		t.Error("there are no rules")
	}

	t.Run("lint", func(t *testing.T) { lint(t, e) })
	t.Run("help", func(t *testing.T) { help(t, e) })
	t.Run("names", func(t *testing.T) { names(t, e) })
}

// knock says something that is no TLS to a pod's tunnel, from the other node.
func knock(e *env, to *lab.Pod) {
	e.t.Helper()
	e.must(e.Nodes[0].Do(func() error {
		c, err := new(net.Dialer).DialContext(e.ctx, "tcp", netip.AddrPortFrom(to.V4, 15008).String())
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
			return err
		}
		_, _ = c.Read(make([]byte, 100)) // what comes is an alert, and the end
		return nil
	}))
}

// ours are the beginnings of the project's own metrics.
var ours = regexp.MustCompile(`^(culvert|istio|mtls|certificate)_`)

// lint has promtool look at the metrics of both nodes: it finds nothing wrong, with
// Istio's names neither.
func lint(t *testing.T, e *env) {
	promtool := program(t, "promtool")
	check := func(text string) (found string) {
		cmd := exec.Command(promtool, "check", "metrics")
		cmd.Stdin = strings.NewReader(text)
		out, err := cmd.CombinedOutput()
		if err != nil && len(out) == 0 {
			t.Fatal(err)
		}
		return string(out)
	}
	for _, d := range e.daemons {
		if found := check(scrape(t, e, d)); found != "" {
			t.Errorf("%s:\n%s", d.Node.Name, found)
		}
	}
	if found := check("# TYPE badlyNamed counter\nbadlyNamed 1\n"); !strings.HasPrefix(found, "badlyNamed ") {
		t.Errorf("control: of a bad name promtool finds %q", found)
	}
}

var described = regexp.MustCompile(`(?m)^# HELP (\S+) (.*)$`)

// help wants a text for each metric, with its unit.
func help(t *testing.T, e *env) {
	text := scrape(t, e, e.daemons[0])
	for _, f := range described.FindAllStringSubmatch(text, -1) {
		name, said := f[1], f[2]
		if said == "" {
			t.Errorf("%s has no help", name)
		}
		for _, unit := range []string{"seconds", "bytes"} {
			if ours.MatchString(name) && strings.Contains(name, "_"+unit) && !strings.Contains(strings.ToLower(said), unit) {
				t.Errorf("%s does not say that it is in %s: %s", name, unit, said)
			}
		}
	}
	if n := strings.Count(text, "# TYPE "); n != len(described.FindAllString(text, -1)) {
		t.Errorf("%d metrics of %d have a help", len(described.FindAllString(text, -1)), n)
	}
}

// names wants each metric in the documentation, and each that rules and dashboard
// ask for among the metrics.
func names(t *testing.T, e *env) {
	page, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	known := []string{}
	for _, f := range described.FindAllStringSubmatch(scrape(t, e, e.daemons[0]), -1) {
		known = append(known, f[1])
		if ours.MatchString(f[1]) && !bytes.Contains(page, []byte("`"+f[1]+"`")) {
			t.Errorf("docs/configuration.md does not have %s", f[1])
		}
	}
	asked := regexp.MustCompile(`\b(culvert|istio|mtls|certificate)_[a-z_]+[a-z]`)
	for _, file := range []string{rulesFile, dashboardFile} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, name := range asked.FindAllString(string(b), -1) {
			n++
			if base := strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count"); !slices.Contains(known, name) && !slices.Contains(known, base) {
				t.Errorf("%s asks for %s, which is no metric", file, name)
			}
		}
		if n == 0 {
			t.Errorf("%s asks for no metric", file)
		}
	}
}
