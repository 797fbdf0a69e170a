// SPDX-License-Identifier: Apache-2.0

// Package peers runs the real daemon against foreign implementations of what it
// speaks: Envoy, Node.js and, where there is one, Istio's ztunnel, each as client
// of ours and as server for ours. The foreign process runs in a pod of node 1,
// which has no daemon; the daemon is node 2's. What is asked of all of them is in
// conversation_test.go, and of each in its own file. Needs root.
package peers

import (
	"context"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// prefix begins the names of all that these tests make.
const prefix = "culvert-peers"

const (
	hbonePort = 15008 // the tunnel's, between pods
	appPort   = 8080  // of the application behind the tunnel
)

// ztunnel is the daemon's binary, built by TestMain unless it is given.
var ztunnel string

func TestMain(m *testing.M) { os.Exit(lab.Main(prefix, &ztunnel, m.Run)) }

// env is a lab of two nodes with three pods each, and a daemon on the second.
type env struct {
	*lab.Lab
	t      *testing.T
	ctx    context.Context
	ca     *testca.CA // below the lab's root
	daemon *lab.Daemon
	ours   *lab.Pod // enrolled by the daemon
	theirs *lab.Pod // the foreign peer's
}

// setup builds the lab, without the daemon.
func setup(t *testing.T) *env {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute*lab.Slowness())
	l, err := lab.New(ctx, lab.Config{Nodes: 2, PodsPerNode: 3, Prefix: prefix})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	e := &env{Lab: l, t: t, ctx: ctx, ours: l.Pod(2, 1), theirs: l.Pod(1, 1)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.Tails(8, "ztunnel.log", "access.log", "peer*.log"))
		}
		if err := l.Close(); err != nil {
			t.Errorf("close lab: %v", err)
		}
		cancel()
	})
	e.must(l.Nodes[1].Configure(lab.DaemonConfig{})) // makes the root
	e.ca = e.authority()
	return e
}

// start starts the daemon. It knows all pods as workloads.
func (e *env) start(settings map[string]any) {
	e.t.Helper()
	n := e.Nodes[1]
	var err error
	e.daemon, err = n.StartDaemon(e.ctx, lab.DaemonConfig{Binary: ztunnel, Pods: n.Pods[:1], Settings: settings})
	e.must(err)
}

// in is the same lab for a subtest.
func (e *env) in(t *testing.T) *env {
	sub := *e
	sub.t = t
	return &sub
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// authority is a CA below the lab's root.
func (e *env) authority() *testca.CA {
	e.t.Helper()
	ca, err := testca.Below(e.RootDir(), lab.TrustDomain)
	e.must(err)
	return ca
}

// files are those of a certificate, as foreign peers read them.
type files struct{ Cert, Key, Root string }

// certificate writes an SVID, its key and the root of who is to be trusted, to
// files of a name. Files that are there are replaced at once.
func (e *env) certificate(name string, by, trusted *testca.CA, id string, options ...testca.Option) files {
	e.t.Helper()
	svid, err := by.SVID(spiffeid.RequireFromString(id), options...)
	e.must(err)
	chain, key, err := (&x509svid.SVID{Certificates: svid.Certificates, PrivateKey: svid.Key}).Marshal()
	e.must(err)
	dir := filepath.Join(e.Dir, "certificates")
	e.must(os.MkdirAll(dir, 0o700))
	f := files{filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key"), filepath.Join(dir, name+".root.pem")}
	for path, content := range map[string][]byte{
		f.Cert: chain,
		f.Key:  key,
		f.Root: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: trusted.Root.Raw}),
	} {
		e.must(os.WriteFile(path+".new", content, 0o600))
		e.must(os.Rename(path+".new", path))
	}
	return f
}

// foreignCA is one that nobody of the mesh trusts, of the same trust domain.
func (e *env) foreignCA() *testca.CA {
	e.t.Helper()
	ca, err := testca.New(lab.TrustDomain)
	e.must(err)
	return ca
}

// open starts a foreign peer in a pod; what it says goes to a file that is shown
// when the test fails.
func (e *env) open(p *lab.Pod, name string, cmd *exec.Cmd) *lab.Process {
	e.t.Helper()
	f, err := os.OpenFile(filepath.Join(p.Node.Dir, "peer-"+name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	e.must(err)
	defer f.Close() // the child has its own
	if cmd.Stdout == nil {
		cmd.Stdout = f
	}
	cmd.Stderr = f
	proc, err := p.Start(cmd)
	e.must(err)
	return proc
}

// listening waits until something listens at an address of a pod.
func (e *env) listening(p *lab.Pod, at netip.AddrPort, proc *lab.Process) {
	e.t.Helper()
	e.must(lab.Until(e.ctx, fmt.Sprintf("%s listens in %s", at, p.Name), func() error {
		c, err := p.Dial(e.ctx, at)
		if err == nil {
			c.Close()
		}
		return err
	}, proc.Ended, lab.Within(patience())))
}

// patience is how long anything may take that takes no time.
func patience() time.Duration { return 10 * time.Second * lab.Slowness() }

// families runs a test for IPv4 and IPv6.
func families(e *env, f func(e *env, family int)) {
	for _, v := range []int{4, 6} {
		e.t.Run(fmt.Sprintf("v%d", v), func(t *testing.T) { f(e.in(t), v) })
	}
}

// connect makes a TCP connection from a pod, of use for as long as a GiB takes.
func connect(e *env, p *lab.Pod, to netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(e.ctx, patience())
	defer cancel()
	c, err := p.Dial(ctx, to)
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(6 * patience()))
		e.t.Cleanup(func() { c.Close() })
	}
	return c, err
}
