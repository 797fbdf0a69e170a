// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/redirect"
)

// maps that only remember, and what the snapshot said at each change.
type fakeMaps struct {
	f       *files
	now     map[netip.Addr]redirect.Destination
	history []string
	full    bool // refuses what is new
	failing int  // the call that fails: 1 is the next one
}

func (m *fakeMaps) SetDestinations(want map[netip.Addr]redirect.Destination) error {
	if m.full && len(want) > len(m.now) {
		return errors.New("the map is full")
	}
	if m.failing--; m.failing == 0 {
		return errors.New("the map cannot be changed")
	}
	m.now = maps.Clone(want)
	m.history = append(m.history, fmt.Sprintf("snapshot %d: %s", m.f.store.Load().Version, describe(want)))
	return nil
}

func describe(m map[netip.Addr]redirect.Destination) string {
	var out []string
	for a, d := range m {
		out = append(out, a.String()+map[redirect.Destination]string{redirect.DestinationHBONE: " hbone", redirect.DestinationTCP: " tcp"}[d])
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func newFiles(t *testing.T, workloads string) (*files, *fakeMaps, string) {
	t.Helper()
	dir := t.TempDir()
	cfg := config.Default(dir)
	cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("cluster.local")
	cfg.Workloads.File = filepath.Join(dir, "w.yaml")
	cfg.Policy.File = filepath.Join(dir, "p.yaml")
	write(t, cfg.Workloads.File, workloads)
	write(t, cfg.Policy.File, "rules: []\n")
	f, err := readFiles(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m := &fakeMaps{f: f}
	if err := f.steer(m); err != nil {
		t.Fatal(err)
	}
	m.history = nil
	return f, m, dir
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

const (
	a = "- {name: a, addresses: [10.0.0.1]}\n"
	b = "- {name: b, addresses: [10.0.0.2]}\n"
	c = "- {name: c, protocol: tcp, addresses: [10.0.0.3]}\n"
)

// At no time are the maps more permissive than the snapshot in force: an address
// is captured before the snapshot says so, and let go after.
func TestMapsAreNeverMorePermissiveThanTheSnapshot(t *testing.T) {
	for name, tt := range map[string]struct{ before, after, tight, loose string }{
		"a new one":        {a, a + b, "10.0.0.1 hbone, 10.0.0.2 hbone", "10.0.0.1 hbone, 10.0.0.2 hbone"},
		"one removed":      {a + b, a, "10.0.0.1 hbone, 10.0.0.2 hbone", "10.0.0.1 hbone"},
		"hbone to tcp":     {a + b, a + strings.Replace(b, "name: b", "name: b, protocol: tcp", 1), "10.0.0.1 hbone, 10.0.0.2 hbone", "10.0.0.1 hbone, 10.0.0.2 tcp"},
		"tcp to hbone":     {a + c, a + strings.Replace(c, "tcp", "hbone", 1), "10.0.0.1 hbone, 10.0.0.3 hbone", "10.0.0.1 hbone, 10.0.0.3 hbone"},
		"a new plain one":  {a, a + c, "10.0.0.1 hbone", "10.0.0.1 hbone, 10.0.0.3 tcp"},
		"a plain one less": {a + c, a, "10.0.0.1 hbone", "10.0.0.1 hbone"},
		"nothing changes":  {a + c, a + c, "10.0.0.1 hbone, 10.0.0.3 tcp", "10.0.0.1 hbone, 10.0.0.3 tcp"},
	} {
		t.Run(name, func(t *testing.T) {
			f, m, dir := newFiles(t, "workloads:\n"+tt.before)
			write(t, filepath.Join(dir, "w.yaml"), "workloads:\n"+tt.after)
			if err := f.takeWorkloads(f.workloads.Read()); err != nil {
				t.Fatal(err)
			}
			want := []string{"snapshot 1: " + tt.tight, "snapshot 2: " + tt.loose}
			if diff := cmp.Diff(want, m.history); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

// A change that cannot be put in force, or a file that is wrong, changes nothing.
func TestWhatCannotBeTakenChangesNothing(t *testing.T) {
	f, m, dir := newFiles(t, "workloads:\n"+a)
	registry := prometheus.NewRegistry()
	r := newReports(slog.New(slog.DiscardHandler), registry, "workloads", "policy")
	m.full = true
	write(t, filepath.Join(dir, "w.yaml"), "workloads:\n"+a+b)
	write(t, filepath.Join(dir, "p.yaml"), "rules: 5\n")
	f.reload(r)
	if v := f.store.Load().Version; v != 1 {
		t.Errorf("snapshot %d is in force", v)
	}
	if got := describe(m.now); got != "10.0.0.1 hbone" {
		t.Errorf("the maps hold %s", got)
	}
	m.full = false
	write(t, filepath.Join(dir, "p.yaml"), "rules: []\n")
	f.reload(r)
	if v := f.store.Load().Version; v != 3 { // one for each file
		t.Errorf("snapshot %d is in force", v)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, metric := range families[0].Metric {
		got[metric.Label[0].GetValue()+" "+metric.Label[1].GetValue()] = metric.Counter.GetValue()
	}
	if diff := cmp.Diff(map[string]float64{"workloads ok": 1, "workloads error": 1, "policy ok": 1, "policy error": 1}, got); diff != "" {
		t.Errorf("reloads counted, -want +got\n%s", diff)
	}
}

// The same of the ports that take plaintext. A pod that comes has what is in force.
func TestPlainPortsAreNeverLooserThanTheSnapshot(t *testing.T) {
	file := func(mode string) string {
		return "modes: [{name: m, namespace: demo, workload: web, " + mode + "}]\n"
	}
	for name, tt := range map[string]struct {
		before, after string
		want          []string // what the kernel is told, with the snapshot in force
	}{
		"opened":          {"", file("mode: permissive"), []string{"1: only []", "2: all but []"}},
		"shut":            {file("mode: permissive"), "", []string{"1: all but []", "1: only []"}},
		"a port shut":     {file("mode: permissive"), file("mode: permissive, ports: {80: strict}"), []string{"1: all but []", "1: all but [80]"}},
		"a port opened":   {file("mode: permissive, ports: {80: strict}"), file("mode: permissive"), []string{"1: all but [80]", "2: all but []"}},
		"another port":    {file("ports: {80: permissive, 90: permissive}"), file("ports: {90: permissive, 99: permissive}"), []string{"1: only [80 90]", "1: only [90]", "2: only [90 99]"}},
		"all but becomes": {file("mode: permissive, ports: {80: strict}"), file("ports: {80: permissive, 90: permissive}"), []string{"1: all but [80]", "1: only [90]", "2: only [80 90]"}},
		"nothing changes": {file("ports: {80: permissive}"), file("ports: {80: permissive}") + "rules: []\n", []string{"1: only [80]"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			cfg := config.Default(dir)
			cfg.Workloads.File, cfg.Policy.File = filepath.Join(dir, "w.yaml"), filepath.Join(dir, "p.yaml")
			write(t, cfg.Workloads.File, "workloads: []\n")
			write(t, cfg.Policy.File, tt.before+"# \n")
			f, err := readFiles(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.steer(&fakeMaps{f: f}); err != nil {
				t.Fatal(err)
			}
			var got []string
			var broken error
			set := func(p redirect.PlainPorts) error {
				if broken != nil {
					return broken
				}
				what := fmt.Sprintf("only %v", p.Only)
				if p.All {
					what = fmt.Sprintf("all but %v", p.Except)
				}
				got = append(got, fmt.Sprintf("%d: %s", f.store.Load().Version, what))
				return nil
			}
			m, err := f.modes.add("demo", "web", set)
			if err != nil {
				t.Fatal(err)
			}
			write(t, cfg.Policy.File, tt.after+"# \n")
			if err := f.takePolicy(f.policy.Read()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}

			// What cannot be shut is not taken; one that has left is told nothing.
			write(t, cfg.Policy.File, file("mode: permissive"))
			if err := f.takePolicy(f.policy.Read()); err != nil {
				t.Fatal(err)
			}
			write(t, cfg.Policy.File, "rules: []\n")
			broken = errors.New("the map is broken")
			if err := f.takePolicy(f.policy.Read()); !errors.Is(err, broken) {
				t.Errorf("a port that cannot be shut: %v", err)
			}
			if s := f.store.Load(); s.Version != 3 || !s.Policy.PlainPorts("demo", "web").All {
				t.Errorf("snapshot %d is in force", s.Version)
			}
			f.modes.remove(m)
			if err := f.takePolicy(f.policy.Read()); err != nil {
				t.Errorf("of a pod that has left: %v", err)
			}
		})
	}
}

// What the kernel's maps could not take is tried again, without a further change
// of the file; a change of the other file is not held up by it.
func TestWhatTheMapsRefuseIsTriedAgain(t *testing.T) {
	f, m, dir := newFiles(t, "workloads:\n"+a)
	registry := prometheus.NewRegistry()
	r := newReports(slog.New(slog.DiscardHandler), registry, "workloads", "policy")
	m.full = true
	write(t, filepath.Join(dir, "w.yaml"), "workloads:\n"+a+b)
	r.say("workloads", f.takeWorkloads(f.workloads.Read()))
	now := time.Now()
	tries := func(d time.Duration) { now = now.Add(d); f.retry(now, r) }
	tries(0) // not yet
	tries(2 * againAfter)
	if got := f.store.Load().Version; got != 1 {
		t.Errorf("snapshot %d is in force", got)
	}
	if err := f.takePolicy(f.policy.Read()); err != nil {
		t.Errorf("the other file: %v", err)
	}
	m.full = false
	tries(againAfter) // one try has failed: not before twice that
	if got := describe(m.now); got != "10.0.0.1 hbone" {
		t.Errorf("the maps hold %s", got)
	}
	tries(2 * againAtMost)
	if got := describe(m.now); got != "10.0.0.1 hbone, 10.0.0.2 hbone" || f.store.Load().Version != 3 {
		t.Errorf("snapshot %d is in force, the maps hold %s", f.store.Load().Version, got)
	}
	if err := r.last["workloads"].err; err != nil {
		t.Errorf("the status says %v still", err)
	}
	tries(2 * againAtMost) // nothing is left
	if got := f.store.Load().Version; got != 3 {
		t.Errorf("snapshot %d is in force", got)
	}

	// A failure behind the snapshot: the maps are stricter, until they settle.
	m.failing = 2
	write(t, filepath.Join(dir, "w.yaml"), "workloads:\n"+a)
	if err := f.takeWorkloads(f.workloads.Read()); err == nil {
		t.Error("no error")
	}
	if got := describe(m.now); got != "10.0.0.1 hbone, 10.0.0.2 hbone" || f.store.Load().Version != 4 {
		t.Errorf("snapshot %d is in force, the maps hold %s", f.store.Load().Version, got)
	}
	now = time.Now()
	tries(2 * againAfter)
	if got := describe(m.now); got != "10.0.0.1 hbone" || f.store.Load().Version != 4 {
		t.Errorf("snapshot %d is in force, the maps hold %s", f.store.Load().Version, got)
	}
}

// What is read while the maps have not settled yet, and cannot be put in force
// either, is tried again like any other.
func TestWhatIsReadBeforeTheMapsSettleIsTriedAgain(t *testing.T) {
	f, m, dir := newFiles(t, "workloads:\n"+a)
	r := newReports(slog.New(slog.DiscardHandler), prometheus.NewRegistry(), "workloads", "policy")
	for _, change := range []struct {
		text    string
		failing int
	}{{a + b, 2}, {a + b + c, 1}} { // behind the snapshot, before it
		m.failing = change.failing
		write(t, filepath.Join(dir, "w.yaml"), "workloads:\n"+change.text)
		err := f.takeWorkloads(f.workloads.Read())
		r.say("workloads", err)
		if err == nil {
			t.Error("no error")
		}
	}
	f.retry(time.Now().Add(2*againAfter), r)
	if got := describe(m.now); got != "10.0.0.1 hbone, 10.0.0.2 hbone, 10.0.0.3 tcp" {
		t.Errorf("the maps hold %s", got)
	}
	if got := f.store.Load().Workloads.Len(); got != 3 {
		t.Errorf("%d workloads are in force", got)
	}
}

// What another file's change has settled is not an error any more.
func TestWhatAnotherFileSettlesIsReported(t *testing.T) {
	f, m, dir := newFiles(t, "workloads:\n"+a)
	r := newReports(slog.New(slog.DiscardHandler), prometheus.NewRegistry(), "workloads", "policy")
	m.failing = 2
	write(t, filepath.Join(dir, "w.yaml"), "workloads:\n"+a+b)
	r.say("workloads", f.takeWorkloads(f.workloads.Read()))
	r.say("policy", f.takePolicy(f.policy.Read()))
	f.retry(time.Now(), r)
	if err := r.last["workloads"].err; err != nil {
		t.Errorf("the status says %v still", err)
	}

	// But for one that is broken by now.
	m.failing = 2
	for _, text := range []string{a, "workloads: 5\n"} {
		write(t, filepath.Join(dir, "w.yaml"), "workloads:\n"+text)
		r.say("workloads", f.takeWorkloads(f.workloads.Read()))
	}
	r.say("policy", f.takePolicy(f.policy.Read()))
	f.retry(time.Now(), r)
	if r.last["workloads"].err == nil {
		t.Error("a broken file is reported as taken")
	}
}

// Of what failed halfway it is not known what the kernel has: it is told all of
// it again.
func TestPlainPortsAreToldAgainAfterAFailure(t *testing.T) {
	var m modes
	var told []string
	broken := false
	if _, err := m.add("demo", "web", func(p redirect.PlainPorts) error {
		told = append(told, fmt.Sprint(p.Only))
		if broken {
			return errors.New("the map is broken")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	m.Lock()
	defer m.Unlock()
	now := policy.NewSet(nil, policy.ModeRule{Namespace: "demo", Workload: "web", Ports: map[uint16]policy.Mode{80: policy.Permissive}})
	if err := m.settle(now); err != nil {
		t.Fatal(err)
	}
	broken = true
	if err := m.stricter(policy.NewSet(nil)); err == nil {
		t.Error("no error")
	}
	broken = false
	if err := m.settle(now); err != nil {
		t.Error(err)
	}
	if err := m.settle(now); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"[]", "[80]", "[]", "[80]"}, told); diff != "" {
		t.Errorf("the kernel was told, -want +got\n%s", diff)
	}
}
