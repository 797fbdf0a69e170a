// SPDX-License-Identifier: Apache-2.0

// Package daemon wires the parts of one node's data plane together and runs
// them. It makes no decisions: what is captured is decided by redirect, what
// may pass by the snapshot, who a peer is by identity.
//
// Run owns everything it opens and closes it in reverse, except what redirect
// has pinned: that stays, so that an enrolled pod is refused and never passed
// on in plaintext while no daemon runs. `ztunnel cleanup` takes it away.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-mesh/culvert/admin"
	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/identity/ca"
	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/pod/static"
	"github.com/culvert-mesh/culvert/preflight"
	"github.com/culvert-mesh/culvert/privilege"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/socket"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel"
)

// Options is what the command line adds to the configuration.
type Options struct {
	Logger    *slog.Logger     // required
	Level     *slog.LevelVar   // the Logger's, to be changed; required
	Lines     *Lines           // keeps what the Logger writes; required
	Log       *telemetry.Spool // what the Logger writes to; nil: its drops are not counted
	Version   string
	AccessLog io.Writer        // default: standard output
	Reload    <-chan os.Signal // each value has the files read again at once; nil: none
	Ready     func()           // is called once, when each pod was tried; nil: nobody asks
}

// Run runs the node's data plane until ctx ends. An error means that it could
// not start, or that a part of it failed; it says what, and what to do.
func Run(ctx context.Context, cfg *config.Config, opt Options) (err error) {
	log, started := opt.Logger, time.Now()
	memory := limitMemory(log)
	var undo closers
	defer func() { err = errors.Join(err, undo.close()) }()

	if err := Check(cfg); err != nil {
		return err
	}
	decided, err := readFiles(cfg)
	if err != nil {
		return err
	}
	source, err := static.Open(cfg.Pods.File, cfg.TrustDomain)
	if err != nil {
		return err
	}
	// The reports have nowhere to go before there are metrics, and no file is read
	// again before that.
	var reports *reports
	issuer, trusted, err := openIdentity(ctx, cfg, log, func(err error) { reports.say("ca", err) })
	if err != nil {
		return err
	}

	// Before anything is attached: a start that fails for it leaves nothing behind.
	if err := preflight.Start(ctx, cfg, log); err != nil {
		return err
	}
	metricsAt, err := listenHTTP(cfg.Metrics.Address)
	if err != nil {
		// Of two with the same files, the later one names the earlier.
		if held := redirect.CheckFree(cfg.RunDir); held != nil {
			return held
		}
		return err
	}
	undo.add(func() error { metricsAt.Close(); return nil }) // its server may have closed it

	node, err := redirect.Open(redirect.Config{RunDir: cfg.RunDir, Cgroup: cfg.Cgroup, Logger: log})
	if err != nil {
		return err
	}
	undo.add(node.Close)
	// Open has mounted bpffs where it had to, the last that asks for more than what
	// is left; nothing of a pod or a peer was read yet.
	if err := privilege.Confine(privilege.Mode(cfg.Seccomp)); err != nil {
		return err
	}
	if err := announce(log, cfg, opt.Version, node); err != nil {
		return err
	}
	if err := errors.Join(node.SetMeshCIDRs(cfg.Mesh.CIDRs), node.SetBypass(cfg.Bypass.CIDRs), decided.steer(node)); err != nil {
		return err
	}

	if opt.AccessLog == nil {
		opt.AccessLog = os.Stdout
	}
	access, err := telemetry.NewAccessLog(telemetry.AccessLogConfig{
		Writer: opt.AccessLog,
		Format: string(cfg.AccessLog.Format),
		Queue:  cfg.AccessLog.Queue,
		Logger: log,
	})
	if err != nil {
		return err
	}
	undo.add(access.Close)
	metrics := telemetry.NewMetrics(telemetry.MetricsConfig{Version: opt.Version, Decisions: node.Counters, AccessLog: access, Log: opt.Log})

	recorder := &telemetry.Recorder{Metrics: metrics, Log: access, Refusals: &telemetry.Refusals{}}

	maker, err := socket.New(node.Own)
	if err != nil {
		return err
	}
	undo.add(maker.Close)

	loops, giveBack := processors(cfg.Loops)
	undo.add(func() error { giveBack(); return nil })
	tun, err := tunnel.New(tunnel.Config{
		Snapshots:        decided.store,
		Identity:         issuer,
		Denied:           trusted.Denied,
		Recorder:         recorder,
		Logger:           log,
		Probe:            redirect.IsProbe,
		Loops:            loops,
		HandshakeTimeout: cfg.Tunnel.HandshakeTimeout,
		ConnectTimeout:   cfg.Tunnel.ConnectTimeout,
		PingAfter:        cfg.Tunnel.PingAfter,
		DeadAfter:        cfg.Tunnel.DeadAfter,
		IdleAfter:        cfg.Tunnel.Idle,
		Memory:           int64(cfg.Tunnel.Memory) << 20,
	})
	if err != nil {
		return err
	}
	undo.add(func() error { tun.Close(); return nil })
	trusted.revoke = tun.Revoke
	countDeliveries(metrics.Registry(), tun.Deliveries())

	var ready atomic.Bool
	failed := make(chan error, 1)
	scraped := metrics.Handler(func() { countLive(ctx, tun) })
	undo.add(serveHTTP(metricsAt, scraped, &ready, failed))

	beside := newExisting(cfg.Existing == config.ExistingReset, log)
	undo.add(beside.close)
	metrics.Registry().MustRegister(beside)
	decided.notify(beside.changed)

	told := newDecisionLog(recorder.Told, decided.store, log, metrics.Registry())

	keeper := pod.NewKeeper(pod.Config{
		Enroller: &enroller{node: node, sockets: maker, tunnel: tun, identity: issuer, modes: &decided.modes, existing: beside, told: told, log: log},
		Logger:   log,
	})
	undo.add(keeper.Close)
	metrics.Registry().MustRegister(podStates{keeper}, newPeerLimits(tun), newLoads(tun), newExpiries(keeper.Status, func(ctx context.Context, s pod.Status) *identity.SVID { return held(ctx, issuer, s) }))
	reports = newReports(log, metrics.Registry(), "pods", "workloads", "policy", "trust", "ca")

	c := &controls{
		cfg: cfg, version: opt.Version, cgroup: node.Cgroup(), memoryLimit: memory, started: started, ready: &ready,
		log: log, level: opt.Level, lines: opt.Lines, keeper: keeper, reports: reports, store: decided.store, issuer: issuer,
		trust: trusted, tunnel: tun, existing: beside, refusals: recorder.Refusals, metrics: scraped,
	}
	served, err := admin.Listen(ctx, admin.Socket(cfg.RunDir), c.mounts()...)
	if err != nil {
		return err
	}
	undo.add(served.Close)

	undo.add(inBackground(ctx, issuer.Run))

	stopWatching := watchFiles(ctx, decided, trusted, source, issuer, keeper, reports, opt.Reload)
	undo.add(stopWatching)

	if err := keeper.Tried(ctx); err != nil {
		return nil // told to end
	}
	// What an earlier process has left of pods that are not listed any more.
	if err := keeper.Sweep(); err != nil {
		return err
	}
	undo.add(inBackground(ctx, func(ctx context.Context) { told.run(ctx, node.Events) }))
	ready.Store(true)
	pods := keeper.Status()
	log.Info("ready", "version", opt.Version, "node", cfg.Node.Name, "pods", len(pods),
		"workloads", decided.store.Load().Workloads.Len(), "metrics", cfg.Metrics.Address.String())
	if len(pods) == 0 {
		log.Warn("no pod is listed: nothing is carried", "hint", noPodsHint(cfg.Pods.File, cfg.Workloads.File))
	}
	if opt.Ready != nil {
		opt.Ready()
	}
	// What the start has read is not needed again, and Go would keep its pages.
	debug.FreeOSMemory()

	select {
	case <-ctx.Done():
		log.Info("stopping: enrolled pods are refused until a daemon runs again", "hint", "`ztunnel cleanup` releases them")
		return nil
	case err := <-failed:
		return err
	}
}

// announce says what of the node is used, for who looks for it.
func announce(log *slog.Logger, cfg *config.Config, version string, node *redirect.Node) error {
	capabilities, err := privilege.Capabilities()
	if err != nil {
		return err
	}
	namespace := func(kind string) string {
		name, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			return err.Error()
		}
		return name
	}
	log.Info("starting", "version", version, "pid", os.Getpid(), "node", cfg.Node.Name, "config", cfg.Path,
		"workloads", cfg.Workloads.File, "pods", cfg.Pods.File, "policy", cfg.Policy.File, "trust", cfg.Identity.TrustFile, "ca", cfg.Identity.CA.Dir,
		"run_dir", cfg.RunDir, "bpffs", node.Pins(), "cgroup", node.CgroupDir(), "netns", namespace("net"), "mntns", namespace("mnt"),
		"capabilities", capabilities, "seccomp", cfg.Seccomp)
	return nil
}

// noPodsHint has entries of both files to copy.
func noPodsHint(pods, workloads string) string {
	const entry = "name: web, serviceAccount: web, addresses: [10.0.1.7]"
	return fmt.Sprintf("list this node's pods in %s, such as: pods: [{%s, netns: /run/netns/web}], and the workloads of all nodes in %s: workloads: [{%s}]; they are read as soon as they change", pods, entry, workloads, entry)
}

// inBackground runs f until stop, which waits for it.
func inBackground(ctx context.Context, f func(context.Context)) (stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); f(ctx) }()
	return func() error {
		cancel()
		<-done
		return nil
	}
}

// watchFiles takes changes of the files, and reads all of them again when it is
// told to, until stop.
func watchFiles(ctx context.Context, decided *files, trusted *trust, source *static.Source, issuer *ca.Authority, keeper *pod.Keeper, r *reports, reload <-chan os.Signal) (stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	changed := source.Changed()
	set := func() {
		pods, err := source.Pods(ctx)
		if err != nil {
			r.log.Error("list pods", "err", err)
			return
		}
		keeper.Set(pods)
	}
	set()
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
				changed = source.Changed()
				set()
			}
		}
	})
	wg.Go(func() { source.Watch(ctx, func(err error) { r.say("pods", err) }) })
	wg.Go(func() { decided.watch(ctx, r) })
	wg.Go(func() { trusted.watch(ctx, r) })
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-reload:
				r.log.Info("told to read the files again")
				decided.reload(r)
				trusted.reload(r)
				r.say("ca", issuer.Reload())
				r.say("pods", source.Reload())
			}
		}
	})
	return func() error {
		cancel()
		wg.Wait()
		return nil
	}
}

// podStates counts the pods by where they are in their lives, when it is scraped.
type podStates struct{ keeper *pod.Keeper }

func podStatesDesc() *prometheus.Desc {
	return prometheus.NewDesc("culvert_pods", "Pods of this node, by where they are in their lives. One that stays enrolling is refused; the log says why.", []string{"state"}, nil)
}

// Describe is prometheus.Collector's.
func (p podStates) Describe(ch chan<- *prometheus.Desc) { ch <- podStatesDesc() }

// Collect is prometheus.Collector's.
func (p podStates) Collect(ch chan<- prometheus.Metric) {
	count := map[pod.State]float64{}
	for _, s := range p.keeper.Status() {
		count[s.State]++
	}
	for _, s := range pod.States()[:pod.Gone] {
		ch <- prometheus.MustNewConstMetric(podStatesDesc(), prometheus.GaugeValue, count[s], s.String())
	}
}

// countWait bounds how long a scrape waits for the loops to count the bytes of
// live connections: a loop that is behind has them counted at the next one.
const countWait = 500 * time.Millisecond

func countLive(ctx context.Context, tun *tunnel.Tunnel) {
	ctx, cancel := context.WithTimeout(ctx, countWait)
	defer cancel()
	tun.Count(ctx)
}

func listenHTTP(addr netip.AddrPort) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", addr.String())
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w (another daemon? set metrics.address)", err)
	}
	return l, nil
}

// serveHTTP serves metrics and readiness.
func serveHTTP(l net.Listener, metrics http.Handler, ready *atomic.Bool, failed chan<- error) (stop func() error) {
	mux := http.NewServeMux()
	mux.Handle("/metrics", metrics)
	mux.HandleFunc("/healthz/live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			http.Error(w, "pods are being enrolled", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			failed <- fmt.Errorf("serve metrics: %w", err)
		}
	}()
	return func() error {
		err := s.Close()
		<-done
		return err
	}
}

// openIdentity opens the embedded authority with what the trust file adds.
func openIdentity(ctx context.Context, cfg *config.Config, log *slog.Logger, report func(error)) (*ca.Authority, *trust, error) {
	t, err := readTrust(cfg.Identity.TrustFile)
	if err != nil {
		return nil, nil, err
	}
	issuer, err := ca.Open(ctx, ca.Config{
		Dir:         cfg.Identity.CA.Dir,
		TrustDomain: cfg.TrustDomain,
		LeafTTL:     cfg.Identity.CA.LeafTTL,
		ExtraRoots:  t.inForce.Load().Roots,
		Logger:      log,
		Report:      report,
	})
	if err != nil {
		return nil, nil, err
	}
	t.issuer = issuer
	return issuer, t, nil
}

// closers are run in reverse; an error does not keep the rest from running.
type closers []func() error

func (c *closers) add(f func() error) { *c = append(*c, f) }

func (c *closers) close() error {
	var errs []error
	for i := len(*c) - 1; i >= 0; i-- {
		errs = append(errs, (*c)[i]())
	}
	return errors.Join(errs...)
}
