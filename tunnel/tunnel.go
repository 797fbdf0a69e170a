// SPDX-License-Identifier: Apache-2.0

// Package tunnel carries pods' connections over mutual TLS: it captures what
// an enrolled pod opens (client), takes in what peers send (server), and keeps
// the connections between them (pool). Plaintext it takes in where the pod's mode
// lets it (plain). It makes the event loops and closes them.
//
// It decides by a snapshot and asks identity for certificates. It does not know
// how sockets are steered to it: listeners are handed to it, and Sockets makes
// the others.
package tunnel

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"net/netip"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/snapshot"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/handshake"
	"github.com/culvert-mesh/culvert/tunnel/loop"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// The tunnel's ports in a pod, all by Istio's habit but HBONE's, which is the
// protocol's.
const (
	OutboundPort = 15001 // what the pod opens is steered here
	InboundPort  = 15006 // plaintext that may come in (PERMISSIVE)
	HBONEPort    = 15008 // mutual TLS
	MetricsPort  = 15020
	ReadyPort    = 15021
)

// ownPort reports whether a port is the tunnel's own and may never be asked
// for through it.
func ownPort(p uint16) bool {
	return p == OutboundPort || p == InboundPort || p == HBONEPort || p == MetricsPort || p == ReadyPort
}

// Sockets makes sockets in one pod's network namespace. Descriptors belong to
// the caller. Its methods may be called from any goroutine.
type Sockets interface {
	// Dial returns a socket of the tunnel's own, bound to the pod's address of
	// dst's family, and not connected.
	Dial(dst netip.Addr) (fd int, err error)
	// Take returns a delivery socket from stock, or false when there is
	// none.
	Take(v6 bool) (fd int, ok bool)
	// Wait calls got with a delivery socket as soon as there is one.
	Wait(v6 bool, got func(fd int, err error))
	// Deliver binds a delivery socket to the client's address, and to a port
	// that avoid (nil: none) does not say true of, and begins to connect it to
	// the application. unix.EINPROGRESS is no error.
	Deliver(fd int, client netip.Addr, dst netip.AddrPort, avoid func(port uint16) bool) error
	// MarkedListener looks for the application's listener that takes dst, and
	// finds it if it has a mark of its own. It may wait.
	MarkedListener(dst netip.AddrPort) (l Listener, found bool, err error)
}

// Recorder takes what happened. It must not block.
type Recorder interface {
	Opened(*telemetry.Connection) telemetry.Flow
	Closed(*telemetry.Flow, *telemetry.Connection)
	Handshake(telemetry.Handshake)
}

// Config has what a Tunnel needs. Snapshots, Identity, Recorder and Logger are
// required.
type Config struct {
	Snapshots *snapshot.Store
	Identity  identity.Source
	Denied    func(*x509.Certificate, spiffeid.ID) (string, bool) // revocation; nil: nothing is revoked
	Recorder  Recorder
	Logger    *slog.Logger
	Probe     func(dst netip.Addr) bool // says of a destination that a connection to it is to be closed and not told of; nil: none

	Loops            int           // event loops; 0: one for each processor that Go uses
	HandshakeTimeout time.Duration // 0: 10 s
	ConnectTimeout   time.Duration // to a peer, and to an application; 0: 10 s
	PingAfter        time.Duration // 0: 10 s
	DeadAfter        time.Duration // 0: 20 s
	IdleAfter        time.Duration // 0: 5 min

	// Memory is what peers can make the node use, in bytes: half for what is
	// queued for applications, half for sessions and streams. 0:
	// relay.DefaultMemory, or a quarter of Go's memory limit where that is less.
	Memory int64
}

// The defaults of Config's times; that of a handshake is tunnel/handshake's.
const (
	defaultConnectTimeout = 10 * time.Second
	defaultPingAfter      = 10 * time.Second
	defaultDeadAfter      = 20 * time.Second
	defaultIdleAfter      = 5 * time.Minute
)

// memoryPart is the default of Config.Memory as a part of Go's memory limit.
const memoryPart = 4

// Tunnel is a node's tunnel.
type Tunnel struct {
	cfg     Config
	workers []*worker
	seed    maphash.Seed
	spread  atomic.Uint32 // gives server sessions to the loops in turn
	top     int           // descriptors from this number on are no connection's
	budget  *relay.Budget
	sources *sources
	turns   *turns // of handshakes
	limits  limits
	pauses  pauses
	failed  damper        // of lines about handshakes
	hoarded damper        // of lines about the budget
	looks   chan struct{} // one token per look at a pod's listeners

	deliveries Deliveries

	ctx    context.Context // ends handshakes and dials
	cancel context.CancelCauseFunc
	tasks  sync.WaitGroup // handshakes and dials
	loops  sync.WaitGroup
}

// worker is a loop with the pool entries that belong to it.
type worker struct {
	*relay.Worker
	t       *Tunnel
	index   int
	entries map[poolKey]*entry
	retired map[*entry]struct{} // taken out of entries, and not empty yet
	inbound map[*inboundTrunk]struct{}
	plain   map[*plain]struct{}
	lives   lives
	load    load

	spare     spare     // for the listeners
	shortSaid time.Time // that descriptors have run out
}

var errClosed = errors.New("tunnel is closing")

// New makes a tunnel and starts its loops.
func New(cfg Config) (*Tunnel, error) {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&cfg.HandshakeTimeout, handshake.DefaultTimeout)
	def(&cfg.ConnectTimeout, defaultConnectTimeout)
	def(&cfg.PingAfter, defaultPingAfter)
	def(&cfg.DeadAfter, defaultDeadAfter)
	def(&cfg.IdleAfter, defaultIdleAfter)
	if cfg.Loops == 0 {
		cfg.Loops = runtime.GOMAXPROCS(0)
	}
	t := &Tunnel{cfg: cfg, seed: maphash.MakeSeed(), looks: make(chan struct{}, maxLooks)}
	if cfg.Memory == 0 {
		cfg.Memory = min(relay.DefaultMemory, debug.SetMemoryLimit(-1)/memoryPart)
	}
	limit, err := descriptors()
	if err != nil {
		return nil, err
	}
	t.top = limit - min(keptDescriptors, limit/8) // the kernel gives the lowest number that is free
	t.budget = relay.NewBudget(cfg.Memory, t.shed)
	t.sources = newSources(t.budget, &t.limits, limit/2/2) // plaintext may have half of the descriptors, two for each
	t.turns = newTurns(cfg.Loops)
	t.ctx, t.cancel = context.WithCancelCause(context.Background())
	for i := range cfg.Loops {
		l, err := loop.New()
		if err != nil {
			t.Close()
			return nil, fmt.Errorf("make event loop %d: %w", i, err)
		}
		w := &worker{Worker: relay.NewWorker(l, t.budget), t: t, index: i, entries: map[poolKey]*entry{}, retired: map[*entry]struct{}{}, inbound: map[*inboundTrunk]struct{}{}, plain: map[*plain]struct{}{}}
		w.spare.hold()
		t.workers = append(t.workers, w)
		t.loops.Go(l.Run)
	}
	t.tasks.Go(t.follow)
	return t, nil
}

// Close ends every connection with a reset, and the loops. It waits for them.
func (t *Tunnel) Close() {
	t.cancel(errClosed)
	for _, w := range t.workers {
		done := make(chan struct{})
		if w.Loop.Post(func() { w.closeAll(); close(done) }) {
			<-done
		}
	}
	t.tasks.Wait()
	for _, w := range t.workers {
		w.Loop.Stop()
	}
	t.loops.Wait()
	for _, w := range t.workers {
		w.spare.release()
	}
}

func (w *worker) closeAll() {
	w.each(func(e *entry) { e.close(errClosed) })
	for in := range w.inbound {
		in.trunk.Close(errClosed)
	}
	for c := range w.plain {
		c.fail(telemetry.ReasonDraining, errClosed.Error())
	}
}

// home is the worker that a pool key belongs to.
func (t *Tunnel) home(k poolKey) *worker {
	return t.workers[maphash.Comparable(t.seed, k)%uint64(len(t.workers))]
}

func (t *Tunnel) trunkConfig(hs *handshake.Result, peer *source) relay.TrunkConfig {
	return relay.TrunkConfig{Peer: peer.account, Until: hs.Peer.Expiry, PingAfter: t.cfg.PingAfter, DeadAfter: t.cfg.DeadAfter, IdleAfter: t.cfg.IdleAfter}
}

func (t *Tunnel) verifier() identity.Verifier {
	return identity.Verifier{Bundles: t.cfg.Identity, Denied: t.cfg.Denied}
}

// PodConfig describes a pod to the tunnel.
type PodConfig struct {
	Key       string // unique on the node
	Name      string
	Namespace string
	Identity  spiffeid.ID
	Sockets   Sockets
}

// Pod is an enrolled pod as the tunnel sees it. A pod replaced under the same
// name is another Pod, and shares no connection with its predecessor.
type Pod struct {
	PodConfig
	t      *Tunnel
	w      *worker // its listeners' loop
	gone   atomic.Bool
	tuples tuples

	ctx    context.Context // ends the pod's handshakes and dials
	cancel context.CancelCauseFunc
	tasks  sync.WaitGroup // handshakes and dials

	mu        sync.Mutex          // guards what follows, and that none of tasks begins once it is gone
	listeners []*acceptor         // owned by w's loop
	named     map[uint64]struct{} // cookies of listeners with a mark of their own
}

// AddPod makes a pod known. Remove takes it away.
func (t *Tunnel) AddPod(cfg PodConfig) *Pod {
	p := &Pod{PodConfig: cfg, t: t, w: t.workers[maphash.String(t.seed, cfg.Key)%uint64(len(t.workers))]}
	p.ctx, p.cancel = context.WithCancelCause(t.ctx)
	return p
}

// start runs a handshake or a dial of the pod in a goroutine; false: the pod is
// gone.
func (p *Pod) start(task func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone.Load() {
		return false
	}
	p.tasks.Add(1)
	p.t.tasks.Go(func() {
		defer p.tasks.Done()
		task()
	})
	return true
}

// ServeOutbound takes over a listener for what the pod opens.
func (p *Pod) ServeOutbound(fd int) error { return p.serve(fd, p.capture, p.captureNone) }

// ServeHBONE takes over a listener for what peers send the pod.
func (p *Pod) ServeHBONE(fd int) error { return p.serve(fd, p.acceptPeer, p.acceptNone) }

// serve registers a listener on the pod's loop and waits until it is. full ends
// connections while there are no descriptors.
func (p *Pod) serve(fd int, accepted, full func(fd int)) error {
	done := make(chan error, 1)
	if !p.w.Loop.Post(func() {
		a := &acceptor{w: p.w, fd: fd, accepted: accepted, full: full}
		err := p.w.Loop.Register(fd, a)
		if err == nil {
			p.mu.Lock()
			p.listeners = append(p.listeners, a)
			p.mu.Unlock()
		}
		done <- err
	}) {
		return errClosed
	}
	return <-done
}

// removeRounds is how often Remove goes around the loops. A connection on its way
// from one loop to another is not found where it was looked for, but where it
// arrives: a dial that has just ended goes to its trunk's loop, from there to the
// entry's, which sends it back to be closed.
const removeRounds = 4

// Remove closes the pod's listeners, ends its handshakes and dials, resets its
// connections, and waits until none is left.
func (p *Pod) Remove() {
	p.mu.Lock()
	p.gone.Store(true)
	listeners := p.listeners
	p.listeners = nil
	p.mu.Unlock()
	p.cancel(errPodGone)
	p.tasks.Wait()
	for range removeRounds {
		var wait sync.WaitGroup
		for _, w := range p.t.workers {
			wait.Add(1)
			if !w.Loop.Post(func() {
				defer wait.Done()
				if w == p.w {
					for _, l := range listeners {
						l.close()
					}
					listeners = nil
				}
				w.removePod(p)
			}) {
				wait.Done()
			}
		}
		wait.Wait()
	}
}

func (w *worker) removePod(p *Pod) {
	w.each(func(e *entry) {
		if e.key.pod == p {
			e.close(errPodGone)
		}
	})
	for in := range w.inbound {
		if in.pod == p {
			in.trunk.Close(errPodGone)
		}
	}
	for c := range w.plain {
		if c.pod == p {
			c.fail(telemetry.ReasonDraining, errPodGone.Error())
		}
	}
}

// each calls f for each entry, retired ones included.
func (w *worker) each(f func(*entry)) {
	for _, e := range w.entries {
		f(e)
	}
	for e := range w.retired {
		f(e)
	}
}

var errPodGone = errors.New("pod is gone")
