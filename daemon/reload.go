// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/config/watch"
	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/snapshot"
	"github.com/culvert-mesh/culvert/workload"
)

// steerer is what a change of destinations is told to.
type steerer interface {
	SetDestinations(map[netip.Addr]redirect.Destination) error
}

// files are what the data plane decides from: the workload file and the policy
// file, read again when they change. A file that cannot be taken changes
// nothing.
type files struct {
	node        steerer
	store       *snapshot.Store
	trustDomain spiffeid.TrustDomain
	mode        policy.ModeRule // the configuration's
	modes       modes
	workloads   *watch.File
	policy      *watch.File // nil: there is none

	mu    sync.Mutex // guards what follows, and orders changes
	table *workload.Table
	rules *policy.Set
	// destinations are those of the snapshot in force.
	destinations map[netip.Addr]redirect.Destination
	changed      func() // they have changed; it does not wait
	pending      pending
}

// readFiles reads the files for the first time. Nothing is in force before
// steer.
func readFiles(cfg *config.Config) (*files, error) {
	f := &files{store: snapshot.NewStore(), trustDomain: cfg.TrustDomain, workloads: watch.New(cfg.Workloads.File), mode: policy.DefaultMode(policy.Mode(cfg.Mode))}
	f.rules = f.newSet(policy.File{})
	data, err := f.workloads.Read()
	if f.table, err = f.parseWorkloads(data, err); err != nil {
		return nil, err
	}
	if cfg.Policy.File != "" {
		f.policy = watch.New(cfg.Policy.File)
		data, err := f.policy.Read()
		if f.rules, err = f.parsePolicy(data, err); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// steer puts what was read in force.
func (f *files) steer(node steerer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.node = node
	return f.change(f.table, f.rules)
}

func (f *files) parseWorkloads(data []byte, err error) (*workload.Table, error) {
	if err != nil {
		return nil, err
	}
	list, err := workload.ParseFile(f.workloads.Path(), data, f.trustDomain)
	if err != nil {
		return nil, err
	}
	table, err := workload.NewTable(list)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.workloads.Path(), err)
	}
	return table, nil
}

func (f *files) parsePolicy(data []byte, err error) (*policy.Set, error) {
	if err != nil {
		return nil, err
	}
	file, err := policy.ParseFile(f.policy.Path(), data)
	if err != nil {
		return nil, err
	}
	return f.newSet(file), nil
}

// newSet makes a set of a file, which may have a mode for the mesh in place of
// the configuration's.
func (f *files) newSet(file policy.File) *policy.Set {
	return policy.NewSet(file.Rules, append([]policy.ModeRule{f.mode}, file.Modes...)...)
}

func (f *files) takeWorkloads(data []byte, err error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	table, err := f.parseWorkloads(data, err)
	if err != nil {
		f.pending.reported("workloads")
		return err
	}
	return f.put("workloads", table, f.rules)
}

func (f *files) takePolicy(data []byte, err error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	rules, err := f.parsePolicy(data, err)
	if err != nil {
		f.pending.reported("policy")
		return err
	}
	return f.put("policy", f.table, rules)
}

// change puts a new state in force. The kernel's maps and the snapshot cannot
// change at one instant, so that they do in three steps, in which the maps are
// never more permissive than either snapshot:
//
//  1. what becomes stricter, in the maps: an address that is to be carried from
//     now on is captured, a port that is to be STRICT is shut. Were the snapshot
//     first, it would be in force while connections still went in plaintext;
//  2. the snapshot. In between, what is captured and what the snapshot in force
//     does not carry is reset by the tunnel: refused, not leaked. The same goes
//     for plaintext that the tunnel accepts and the snapshot does not let in;
//  3. what becomes looser, in the maps: an address that is no longer carried, or
//     is to be reached in plaintext, a port that is to be PERMISSIVE. Were it
//     before the snapshot, connections would go in plaintext to an address that
//     the snapshot in force says is carried, or be taken that it does not let in.
//
// A failure before the snapshot puts the maps back. One after it leaves them
// stricter than the snapshot, and is noted as pending. The caller holds mu.
func (f *files) change(table *workload.Table, rules *policy.Set) error {
	next := destinations(table)
	f.modes.Lock()
	defer f.modes.Unlock()
	if err := errors.Join(f.modes.stricter(rules), f.node.SetDestinations(strictest(f.destinations, next))); err != nil {
		if f.destinations != nil {
			err = errors.Join(err, f.node.SetDestinations(f.destinations), f.modes.settle(f.rules))
		}
		return err
	}
	f.table, f.rules = table, rules
	f.store.Publish(table, rules)
	f.destinations = next
	err := errors.Join(f.node.SetDestinations(next), f.modes.settle(rules))
	f.pending.settle = err != nil
	if f.changed != nil {
		f.changed()
	}
	return err
}

// notify has changed called at each change from now on.
func (f *files) notify(changed func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.changed = changed
}

// destinations are what the programs are to know of the workloads.
func destinations(table *workload.Table) map[netip.Addr]redirect.Destination {
	out := make(map[netip.Addr]redirect.Destination)
	for w := range table.All() {
		d := redirect.DestinationHBONE
		if w.Protocol == workload.TCP {
			d = redirect.DestinationTCP
		}
		for _, a := range w.Addresses {
			out[a] = d
		}
	}
	return out
}

// strictest joins what is in force with what is to be: an address is carried
// that either carries, and is passed on in plaintext only where both pass it on.
// (One that is not in the map is refused inside mesh.cidrs, so that leaving a
// plaintext one out is the stricter.) At the start nothing is in force; what an
// earlier process has left is replaced.
func strictest(now, next map[netip.Addr]redirect.Destination) map[netip.Addr]redirect.Destination {
	if now == nil {
		return next
	}
	out := make(map[netip.Addr]redirect.Destination, len(next))
	for a, d := range next {
		if d != redirect.DestinationTCP || now[a] == d {
			out[a] = d
		}
	}
	maps.Copy(out, only(now, redirect.DestinationHBONE))
	return out
}

func only(all map[netip.Addr]redirect.Destination, d redirect.Destination) map[netip.Addr]redirect.Destination {
	out := maps.Clone(all)
	maps.DeleteFunc(out, func(_ netip.Addr, is redirect.Destination) bool { return is != d })
	return out
}

// reload reads both files now.
func (f *files) reload(r *reports) {
	r.say("workloads", f.takeWorkloads(f.workloads.Read()))
	if f.policy != nil {
		r.say("policy", f.takePolicy(f.policy.Read()))
	}
}

// watch takes changes of the files until ctx ends.
func (f *files) watch(ctx context.Context, r *reports) {
	watch.Run(ctx, func() {
		if data, changed, err := f.workloads.Changed(); changed {
			r.say("workloads", f.takeWorkloads(data, err))
		}
		if f.policy != nil {
			if data, changed, err := f.policy.Changed(); changed {
				r.say("policy", f.takePolicy(data, err))
			}
		}
		f.retry(time.Now(), r)
	})
}

// reports says how reloads went, in log and metric.
type reports struct {
	log     *slog.Logger
	reloads *prometheus.CounterVec

	mu   sync.Mutex        // guards last
	last map[string]reload // by file; none: as it was read at start
}

// reload is how the last reload of a file went.
type reload struct {
	at  time.Time
	err error
}

// Results of a reload.
const (
	reloadOK    = "ok"
	reloadError = "error"
)

func newReports(log *slog.Logger, registry *prometheus.Registry, names ...string) *reports {
	r := &reports{log: log, last: map[string]reload{}, reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "culvert_config_reloads_total",
		Help: "Files that were read again, by how it went: ok, or error and the last good state was kept.",
	}, []string{"file", "result"})}
	for _, name := range names {
		for _, result := range []string{reloadOK, reloadError} {
			r.reloads.WithLabelValues(name, result)
		}
	}
	registry.MustRegister(r.reloads)
	return r
}

func (r *reports) say(name string, err error) {
	r.mu.Lock()
	r.last[name] = reload{time.Now(), err}
	r.mu.Unlock()
	if err != nil {
		r.reloads.WithLabelValues(name, reloadError).Inc()
		r.log.Error("a changed file is not taken: the last good state stays in force", "file", name, "err", err)
		return
	}
	r.reloads.WithLabelValues(name, reloadOK).Inc()
	r.log.Info("file read", "file", name)
}
