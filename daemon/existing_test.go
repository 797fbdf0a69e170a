// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

// fakePod has connections beside the tunnel, and keeps deliveries clear of some.
type fakePod struct {
	mu    sync.Mutex
	found []redirect.Existing
	fails error // of a look
	stays error // of a reset
	looks int
	held  []string
}

func (f *fakePod) Existing() ([]redirect.Existing, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.looks++
	return slices.Clone(f.found), f.fails
}

func (f *fakePod) Reset(c redirect.Existing) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stays != nil {
		return f.stays
	}
	f.found = slices.DeleteFunc(f.found, func(o redirect.Existing) bool { return o.Remote == c.Remote })
	return nil
}

func (f *fakePod) HoldTuple(client, local netip.AddrPort) {
	f.held = append(f.held, client.String()+" "+local.String())
}

func (f *fakePod) DropTuple(client, local netip.AddrPort) {
	i := slices.Index(f.held, client.String()+" "+local.String())
	if i < 0 {
		f.held = append(f.held, "dropped what was not held")
		return
	}
	f.held = slices.Delete(f.held, i, i+1)
}

func older(port int) redirect.Existing {
	return redirect.Existing{Local: netip.MustParseAddrPort("10.0.0.1:80"), Remote: netip.MustParseAddrPort(fmt.Sprint("10.0.0.2:", port))}
}

func watching(t *testing.T, reset bool) (*existing, *strings.Builder) {
	t.Helper()
	var log strings.Builder
	x := newExisting(reset, slog.New(slog.NewTextHandler(&log, nil)))
	t.Cleanup(func() { x.close() })
	return x, &log
}

func TestExistingAreToldUntilTheyEnd(t *testing.T) {
	x, log := watching(t, false)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(x)
	counts := func(want string) {
		t.Helper()
		const help = "# HELP culvert_existing_connections Connections of a pod with the mesh that are older than its enrolment, and in plaintext.\n# TYPE culvert_existing_connections gauge\n"
		if err := testutil.GatherAndCompare(registry, strings.NewReader(help+want), "culvert_existing_connections"); err != nil {
			t.Error(err)
		}
	}
	busy, quiet := &fakePod{found: []redirect.Existing{older(1), older(2)}}, &fakePod{}
	p := x.add("busy", busy, busy)
	q := x.add("quiet", quiet, quiet)
	if said := log.String(); strings.Count(said, "level=WARN") != 1 || !strings.Contains(said, "pod=busy connections=2") || !strings.Contains(said, "existing: reset") {
		t.Errorf("the log says: %s", said)
	}
	if diff := cmp.Diff([]string{"10.0.0.2:1 10.0.0.1:80", "10.0.0.2:2 10.0.0.1:80"}, busy.held); diff != "" {
		t.Errorf("kept clear of, -want +got\n%s", diff)
	}
	looks := quiet.looks
	counts("culvert_existing_connections{pod=\"busy\"} 2\nculvert_existing_connections{pod=\"quiet\"} 0\n")
	if quiet.looks != looks {
		t.Error("a scrape looks at a pod that has none")
	}

	busy.found = busy.found[1:]
	counts("culvert_existing_connections{pod=\"busy\"} 1\nculvert_existing_connections{pod=\"quiet\"} 0\n")
	if diff := cmp.Diff([]string{"10.0.0.2:2 10.0.0.1:80"}, busy.held); diff != "" {
		t.Errorf("kept clear of, -want +got\n%s", diff)
	}
	busy.fails = errors.New("no netlink")
	if _, err := x.look(p); err == nil {
		t.Error("a look that fails is none")
	}
	counts("culvert_existing_connections{pod=\"busy\"} 1\nculvert_existing_connections{pod=\"quiet\"} 0\n")
	busy.fails, busy.found = nil, nil
	counts("culvert_existing_connections{pod=\"busy\"} 0\nculvert_existing_connections{pod=\"quiet\"} 0\n")
	if said := log.String(); !strings.Contains(said, "the last connection from before the enrolment has ended") {
		t.Errorf("the log says: %s", said)
	}

	quiet.found = []redirect.Existing{older(3)}
	if _, err := x.look(q); err != nil {
		t.Error(err)
	}
	if n := x.remove(q); n != 1 {
		t.Errorf("%d were left at the end", n)
	}
	looks = quiet.looks
	if found, err := x.look(q); len(found) != 0 || err != nil || quiet.looks != looks {
		t.Error("a namespace is looked at that may be gone")
	}
	counts("culvert_existing_connections{pod=\"busy\"} 0\n")
}

func TestExistingAreReset(t *testing.T) {
	x, log := watching(t, true)
	p := &fakePod{found: []redirect.Existing{older(1), older(2)}}
	at := x.add("pod", p, p)
	if at.count() != 0 || len(p.found) != 0 || !strings.Contains(log.String(), "they are reset") {
		t.Errorf("%d are left; the log says: %s", len(p.found), log)
	}
	// A kernel that cannot: they are kept, listed, and it is said why.
	log.Reset()
	p.found, p.stays = []redirect.Existing{older(3), older(4)}, fmt.Errorf("end it: %w", sockdiag.ErrNoDestroy)
	if found, err := x.look(at); len(found) != 2 || err != nil {
		t.Errorf("%v, %v", found, err)
	}
	if said := log.String(); !strings.Contains(said, "CONFIG_INET_DIAG_DESTROY") || !strings.Contains(said, "connections=2") || strings.Contains(said, "they are reset") {
		t.Errorf("the log says: %s", said)
	}
	if len(p.held) != 2 {
		t.Errorf("kept clear of %v", p.held)
	}
}

// Of a pod that cannot be looked at it is not told that it has none, and it is
// said once why.
func TestExistingOfAPodThatCannotBeLookedAt(t *testing.T) {
	x, log := watching(t, true)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(x)
	p := &fakePod{fails: errors.New("no netlink")}
	at := x.add("pod", p, p)
	for range 3 {
		if _, err := x.look(at); err == nil {
			t.Error("a look that fails is none")
		}
	}
	if said := log.String(); strings.Count(said, "no netlink") != 1 {
		t.Errorf("the log says: %s", said)
	}
	if n, err := testutil.GatherAndCount(registry); n != 0 || err != nil {
		t.Errorf("%d series, %v", n, err)
	}
	p.fails = nil
	if _, err := x.look(at); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(registry); n != 1 || err != nil {
		t.Errorf("%d series, %v", n, err)
	}
}
