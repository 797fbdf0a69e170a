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
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/admin"
	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/identity/ca"
	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/pod/static"
	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/socket"
	"github.com/culvert-mesh/culvert/snapshot"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel"
	"github.com/culvert-mesh/culvert/workload"
)

// Options is what the command line adds to the configuration.
type Options struct {
	Logger    *slog.Logger // required
	Version   string
	AccessLog io.Writer // default: standard output
}

// Run runs the node's data plane until ctx ends. An error means that it could
// not start, or that a part of it failed; it says what, and what to do.
func Run(ctx context.Context, cfg *config.Config, opt Options) (err error) {
	log := opt.Logger
	var undo closers
	defer func() { err = errors.Join(err, undo.close()) }()

	store := snapshot.NewStore()
	pods, err := readFiles(ctx, cfg, store)
	if err != nil {
		return err
	}
	issuer, denied, err := openIdentity(ctx, cfg, log)
	if err != nil {
		return err
	}

	node, err := redirect.Open(redirect.Config{RunDir: cfg.RunDir, Cgroup: cfg.Cgroup, Logger: log})
	if err != nil {
		return err
	}
	undo.add(node.Close)
	if err := steer(node, cfg, store.Load()); err != nil {
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
	metrics := telemetry.NewMetrics(telemetry.MetricsConfig{Version: opt.Version, Decisions: node.Counters, AccessLog: access})

	maker, err := socket.New(node.Own)
	if err != nil {
		return err
	}
	undo.add(maker.Close)

	tun, err := tunnel.New(tunnel.Config{
		Snapshots:        store,
		Identity:         issuer,
		Denied:           denied,
		Recorder:         &telemetry.Recorder{Metrics: metrics, Log: access},
		Logger:           log,
		Loops:            cfg.Loops,
		HandshakeTimeout: cfg.Tunnel.HandshakeTimeout,
		ConnectTimeout:   cfg.Tunnel.ConnectTimeout,
		PingAfter:        cfg.Tunnel.PingAfter,
		DeadAfter:        cfg.Tunnel.DeadAfter,
		IdleAfter:        cfg.Tunnel.Idle,
	})
	if err != nil {
		return err
	}
	undo.add(func() error { tun.Close(); return nil })

	var ready atomic.Bool
	failed := make(chan error, 1)
	stop, err := serveHTTP(cfg.Metrics.Address, metrics, &ready, failed)
	if err != nil {
		return err
	}
	undo.add(stop)

	controls, err := admin.Listen(ctx, filepath.Join(cfg.RunDir, "admin.sock"))
	if err != nil {
		return err
	}
	undo.add(controls.Close)

	renewing, stopRenewing := context.WithCancel(ctx)
	renewed := make(chan struct{})
	go func() { defer close(renewed); issuer.Run(renewing) }()
	undo.add(func() error { stopRenewing(); <-renewed; return nil })

	e := enroller{node: node, sockets: maker, tunnel: tun, identity: issuer, log: log}
	for _, p := range pods {
		release, err := e.enrol(ctx, p)
		if err != nil {
			return fmt.Errorf("enrol pod %s: %w", p.Key(), err)
		}
		undo.add(release)
	}
	// Pods that an earlier process enrolled and that are not listed any more.
	released, err := node.ReleaseOthers(nil)
	for _, what := range released {
		log.Info("released a pod that is not listed any more", "what", what)
	}
	if err != nil {
		return err
	}
	ready.Store(true)
	log.Info("ready", "version", opt.Version, "node", cfg.NodeName, "pods", len(pods),
		"workloads", store.Load().Workloads.Len(), "metrics", cfg.Metrics.Address.String())
	if len(pods) == 0 {
		log.Warn("no pod is enrolled: nothing is carried", "hint", "list this node's pods in "+cfg.Pods.File)
	}

	select {
	case <-ctx.Done():
		log.Info("stopping: enrolled pods are refused until a daemon runs again", "hint", "`ztunnel cleanup` releases them")
		return nil
	case err := <-failed:
		return err
	}
}

// readFiles reads what the data plane decides from, and this node's pods.
func readFiles(ctx context.Context, cfg *config.Config, store *snapshot.Store) ([]pod.Pod, error) {
	data, err := os.ReadFile(cfg.Workloads.File)
	if err != nil {
		return nil, fmt.Errorf("read workloads: %w", err)
	}
	list, err := workload.ParseFile(cfg.Workloads.File, data, cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	table, err := workload.NewTable(list)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cfg.Workloads.File, err)
	}
	var rules []policy.Rule
	if f := cfg.Policy.File; f != "" {
		data, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("read policy: %w", err)
		}
		if rules, err = policy.ParseFile(f, data); err != nil {
			return nil, err
		}
	}
	store.Publish(table, policy.NewSet(rules))
	source, err := static.Open(cfg.Pods.File, cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	return source.Pods(ctx)
}

// steer tells the programs which destinations are carried.
func steer(node *redirect.Node, cfg *config.Config, snap *snapshot.Snapshot) error {
	dst := make(map[netip.Addr]redirect.Destination)
	for w := range snap.Workloads.All() {
		d := redirect.DestinationHBONE
		if w.Protocol == workload.TCP {
			d = redirect.DestinationTCP
		}
		for _, a := range w.Addresses {
			dst[a] = d
		}
	}
	if err := node.SetDestinations(dst); err != nil {
		return err
	}
	if err := node.SetMeshCIDRs(cfg.Mesh.CIDRs); err != nil {
		return err
	}
	return node.SetBypass(cfg.Bypass.CIDRs)
}

// serveHTTP serves metrics and readiness.
func serveHTTP(addr netip.AddrPort, metrics *telemetry.Metrics, ready *atomic.Bool, failed chan<- error) (stop func() error, err error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", addr.String())
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w (another daemon? set metrics.address)", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", metrics.Handler())
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
	}, nil
}

// openIdentity opens the embedded authority with what the trust file adds.
func openIdentity(ctx context.Context, cfg *config.Config, log *slog.Logger) (*ca.Authority, func(*x509.Certificate, spiffeid.ID) (string, bool), error) {
	trust := &config.Trust{}
	if cfg.Identity.TrustFile != "" {
		var err error
		if trust, err = config.LoadTrust(cfg.Identity.TrustFile); err != nil {
			return nil, nil, err
		}
	}
	issuer, err := ca.Open(ctx, ca.Config{
		Dir:         cfg.Identity.CA.Dir,
		TrustDomain: cfg.TrustDomain,
		LeafTTL:     cfg.Identity.CA.LeafTTL,
		ExtraRoots:  trust.Roots,
		Logger:      log,
	})
	if err != nil {
		return nil, nil, err
	}
	return issuer, trust.Denied, nil
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
