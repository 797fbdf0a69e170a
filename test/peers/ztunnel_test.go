// SPDX-License-Identifier: Apache-2.0

package peers

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
	"github.com/culvert-mesh/culvert/test/istio"
)

// Istio's own ztunnel, as in ambient mode: a node agent hands it a pod, the pod has
// istio-cni's rules, and it knows the mesh by a file. It runs in the namespace of
// its pod rather than of the node, so that there may be several. Whoever changes
// this has to run it with a binary of theirs: none comes with the packages of any
// registry.

const (
	plainPort    = 15006 // one of its own, to which it carries nothing
	deniedPort   = 8401  // which its policy denies
	longestDrain = time.Minute
)

// ztunnelBinary is what PEER_ZTUNNEL names.
func ztunnelBinary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("PEER_ZTUNNEL")
	if path == "" {
		t.Skip("no Istio ztunnel here: name its binary by PEER_ZTUNNEL")
	}
	return path
}

// ambient is a running one.
type ambient struct {
	*lab.Process
	pod  *lab.Pod
	log  string // the file of what it says
	read int    // bytes of it
}

// told is what a ztunnel is told, where that is not as it is for all.
type told struct {
	name     string       // of its files
	issue    testca.Issue // makes its certificates; nil: the lab's authority
	accounts map[*lab.Pod]string
	home     *lab.Pod // in whose namespace it runs; nil: in that of the pod which it takes
}

// redirected gives all pods of node 1 Istio's rules.
func redirected(e *env) {
	e.t.Helper()
	for _, p := range e.Nodes[0].Pods {
		e.must(istio.Redirect(p))
	}
}

// startZtunnel starts one for a pod, and waits until it has taken it.
func startZtunnel(e *env, binary string, p *lab.Pod, c told) *ambient {
	e.t.Helper()
	mesh := istio.Mesh{Pods: e.Pods(), Accounts: c.accounts, Denied: []uint16{deniedPort}}
	config := filepath.Join(e.Dir, "ztunnel-"+c.name+".yaml") // which JSON is
	e.must(os.WriteFile(config, mesh.JSON(), 0o600))
	agent, err := mesh.Agent(filepath.Join(e.Dir, "zds-"+c.name), []*lab.Pod{p})
	e.must(err)
	e.t.Cleanup(func() { agent.Close() })
	home := p
	if c.home != nil {
		home = c.home
	}
	port, root := serveCertificates(e, home, c)
	cmd := exec.Command(binary, "proxy", "ztunnel")
	cmd.Dir = e.Dir
	cmd.Env = append(os.Environ(), append(agent.Environment(p.Node, config), "RUST_BACKTRACE=0",
		fmt.Sprintf("CA_ADDRESS=https://localhost:%d", port), "CA_ROOT_CA="+root,
		fmt.Sprintf("CONNECTION_TERMINATION_DEADLINE=%.0fs", longestDrain.Seconds()))...)
	z := &ambient{pod: p, log: filepath.Join(p.Node.Dir, "peer-ztunnel-"+c.name+".log")}
	if b, err := os.ReadFile(z.log); err == nil { // of one before it
		z.read = len(b)
	}
	z.Process = e.open(home, "ztunnel-"+c.name, cmd)
	select {
	case err = <-agent.Taken():
	case <-z.Done():
		err = z.Wait(e.ctx)
	case <-time.After(patience()):
		err = errors.New("it has not taken its pod")
	}
	e.must(err)
	return z
}

// says waits for the next line of its log that has all the words.
func (z *ambient) says(e *env, words ...string) {
	e.t.Helper()
	e.must(lab.Until(e.ctx, fmt.Sprintf("the ztunnel says %q", words), func() error {
		b, err := os.ReadFile(z.log)
		if err != nil {
			return err
		}
		for rest := string(b[z.read:]); ; {
			line, after, whole := strings.Cut(rest, "\n")
			if !whole {
				return errors.New("no line yet")
			}
			rest = after
			has := true
			for _, w := range words {
				has = has && strings.Contains(line, w)
			}
			if has {
				z.read = len(b) - len(rest)
				return nil
			}
		}
	}, z.Ended, lab.Within(patience())))
}

// serveCertificates answers istio.v1.auth.IstioCertificateService in a pod, and
// returns its port and the file of the root by which it is known itself.
func serveCertificates(e *env, p *lab.Pod, c told) (port int, root string) {
	e.t.Helper()
	server, err := e.ca.Istio(c.issue)
	e.must(err)
	l, err := p.Listen("tcp", "localhost:0")
	e.must(err)
	done := make(chan error, 1)
	go func() { done <- server.ServeTLS(l, "", "") }()
	e.t.Cleanup(func() {
		server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			e.t.Error(err)
		}
	})
	return l.Addr().(*net.TCPAddr).Port, e.certificate("authority", e.ca, e.ca, p.Identity()).Root
}

// trusting has one authority issue a ztunnel's certificates, and the other be the
// one that it trusts: the root is the last of a chain.
func trusting(by, trusted *testca.CA) testca.Issue {
	return func(r *x509.CertificateRequest) ([]*x509.Certificate, error) {
		chain, err := by.Issue(r)
		if err == nil {
			chain[len(chain)-1] = trusted.Root
		}
		return chain, err
	}
}

// shortly gives certificates that end soon, until it is told to end that.
func shortly(ca *testca.CA) (issue testca.Issue, end func()) {
	var long atomic.Bool
	return func(r *x509.CertificateRequest) ([]*x509.Certificate, error) {
		if long.Load() {
			return ca.Issue(r)
		}
		return ca.Issue(r, testca.ValidFor(short))
	}, func() { long.Store(true) }
}

// through is a way by a ztunnel, to an application of our pod.
func (z *ambient) through(app *application) *way {
	return &way{direction: "inbound", app: app, hidesResets: true, dial: func(e *env, family int) (*net.TCPConn, error) {
		return connect(e, z.pod, app.Addr(family))
	}}
}

// TestZtunnelClient: Istio's ztunnel as client of our server.
func TestZtunnelClient(t *testing.T) {
	binary := ztunnelBinary(t)
	e := setup(t)
	e.start(denying(e))
	redirected(e)
	app := serve(e, e.ours)
	z := startZtunnel(e, binary, e.theirs, told{name: "client"})
	good := z.through(app)
	good.converse(e)
	e.t.Run("Named", func(t *testing.T) {
		families(e.in(t), func(e *env, family int) {
			app.is(echo)
			watch := e.watch("inbound")
			c := good.connect(e, family)
			e.must(lab.Exchange(c, "x"))
			_ = c.Close()
			l := watch.ended(e, app.Addr(family), "ok")
			for field, want := range map[string]string{
				"src.addr":     c.LocalAddr().String(), // by its forwarded
				"src.workload": e.theirs.Name, "src.identity": e.theirs.Identity(),
			} {
				if got := l.String(field); got != want {
					e.t.Errorf("our log's %s is %q, want %q", field, got, want)
				}
			}
			if l.String("trace") == "" {
				e.t.Error("our log has not its trace")
			}
		})
	})
	e.t.Run("RefusedConnect", func(t *testing.T) {
		p := e.Pod(1, 2)
		denied := startZtunnel(e.in(t), binary, p, told{name: "denied", accounts: map[*lab.Pod]string{p: deniedAccount}})
		defer denied.Kill()
		families(e.in(t), func(e *env, family int) {
			for _, c := range []struct {
				z              *ambient
				port           uint16
				status, reason string
			}{{denied, appPort, "401", "denied"}, {z, closedPort, "503", "refused"}, {z, hbonePort, "503", "refused"}} {
				watch, dst := e.watch("inbound"), netip.AddrPortFrom(e.ours.Addr(family), c.port)
				if err := sees(connect(e, c.z.pod, dst)); err == nil {
					e.t.Errorf("port %d: the application saw a byte", c.port)
				}
				c.z.says(e, "error=", c.status)
				watch.ended(e, dst, c.reason)
			}
			good.carries(e, family) // the control
		})
	})
	e.t.Run("RefusedCertificate", func(t *testing.T) {
		p := e.Pod(1, 3)
		for _, c := range []struct {
			told
			ours []string // that our log has
			its  string   // that the ztunnel's has
		}{
			// Ours refuses its.
			{told{name: "unknown", issue: trusting(e.foreignCA(), e.ca)}, []string{"reason=chain_validation_failed"}, "UnknownCA"},
			// It refuses ours.
			{told{name: "elsewhere", accounts: map[*lab.Pod]string{e.ours: "somebody"}}, []string{"reason=refused_by_peer", "certificate_unknown"}, "identity verification error"},
		} {
			t.Run(c.name, func(t *testing.T) {
				e := e.in(t)
				z := startZtunnel(e, binary, p, c.told)
				defer z.Kill()
				families(e, func(e *env, family int) {
					watch := e.watch("inbound")
					if err := z.through(app).sees(e, family); err == nil {
						e.t.Error("the application saw a byte")
					}
					watch.refused(e, append(c.ours, "reporter=destination")...)
					z.says(e, c.its)
				})
			})
		}
		families(e.in(t), good.carries) // the control
	})
	e.t.Run("GoAway", func(t *testing.T) {
		t.Run("ours", func(t *testing.T) {
			families(e.in(t), func(e *env, family int) {
				issue, renew := shortly(e.ca)
				z := startZtunnel(e, binary, e.Pod(1, 2), told{name: "short", issue: issue})
				defer z.Kill()
				w := z.through(app)
				w.goesOn(e, family, func() {
					renew()
					w.untilAnother(e, family) // at the end of the client's certificate
				})()
			})
		})
		t.Run("theirs", func(t *testing.T) {
			t.Skip("a ztunnel says no GOAWAY as a client: it closes a session that it does not need")
		})
	})
	e.t.Run("Rekey", noRekeying("Istio's ztunnel"))
}

// TestZtunnelServer: Istio's ztunnel as server for our client.
func TestZtunnelServer(t *testing.T) {
	binary := ztunnelBinary(t)
	e := setup(t)
	e.start(nil)
	redirected(e)
	app := serve(e, e.theirs)
	startZtunnel(e, binary, e.theirs, told{name: "server"})
	good := to(app)
	good.hidesResets = true
	good.converse(e)
	e.t.Run("Named", func(t *testing.T) {
		families(e.in(t), func(e *env, family int) {
			from := make(chan netip.AddrPort, 1)
			app.is(func(c *net.TCPConn) {
				from <- c.RemoteAddr().(*net.TCPAddr).AddrPort()
				echo(c)
			})
			c := good.connect(e, family)
			defer c.Close()
			e.must(lab.Exchange(c, "x"))
			if got := (<-from).Addr().Unmap(); got != e.ours.Addr(family) {
				e.t.Errorf("its application is called by %s, want %s", got, e.ours.Addr(family))
			}
		})
	})
	e.t.Run("RefusedConnect", func(t *testing.T) {
		families(e.in(t), func(e *env, family int) {
			for _, c := range []struct {
				port           uint16
				status, reason string
			}{{deniedPort, "401", "denied_by_peer"}, {closedPort, "503", "unreachable"}, {plainPort, "503", "unreachable"}} {
				watch, dst := e.watch("outbound"), netip.AddrPortFrom(e.theirs.Addr(family), c.port)
				if err := sees(connect(e, e.ours, dst)); !lab.IsReset(err) {
					e.t.Errorf("port %d: the application saw %v, want a reset", c.port, err)
				}
				if l := watch.ended(e, dst, c.reason); !strings.Contains(l.String("detail"), c.status) {
					e.t.Errorf("port %d: detail %q, want %s in it", c.port, l.String("detail"), c.status)
				}
			}
			good.carries(e, family) // the control
		})
	})
	e.t.Run("RefusedCertificate", func(t *testing.T) {
		p := e.Pod(1, 3)
		for _, c := range []struct {
			told
			reason string // by which ours refuses it; empty: it refuses ours
			its    string // that the ztunnel's log has
		}{
			{told{name: "somebody", accounts: map[*lab.Pod]string{p: "somebody"}}, "identity_mismatch", "AccessDenied"},
			{told{name: "unknown", issue: trusting(e.foreignCA(), e.ca)}, "chain_validation_failed", "UnknownCA"},
			{told{name: "distrusts", issue: trusting(e.ca, e.foreignCA())}, "", "UnknownIssuer"},
		} {
			t.Run(c.name, func(t *testing.T) {
				e := e.in(t)
				z := startZtunnel(e, binary, p, c.told)
				defer z.Kill()
				families(e, func(e *env, family int) {
					stranger{pod: p, reason: c.reason}.fails(e, family, "refused_by_peer", func() { z.says(e, c.its) })
				})
			})
		}
		families(e.in(t), good.carries) // the control
	})
	e.t.Run("GoAway", func(t *testing.T) { // of a pod of its own, with one session
		e := e.in(t)
		p := e.Pod(1, 2)
		fresh := to(serve(e, p))
		t.Run("ours", func(t *testing.T) {
			families(e.in(t), func(e *env, family int) {
				issue, renew := shortly(e.ca)
				z := startZtunnel(e, binary, p, told{name: "short", issue: issue})
				defer z.Kill()
				fresh.goesOn(e, family, func() {
					renew()
					fresh.untilAnother(e, family) // at the end of the server's certificate
				})()
			})
		})
		t.Run("theirs", func(t *testing.T) {
			families(e.in(t), func(e *env, family int) {
				z := startZtunnel(e, binary, p, told{name: "first"})
				defer z.Kill()
				fresh.goesOn(e, family, func() { // one takes the place of another, as at an upgrade
					next := startZtunnel(e, binary, p, told{name: "next", home: e.Pod(1, 3)})
					e.t.Cleanup(next.Kill)
					e.must(z.Signal(syscall.SIGTERM))
					fresh.untilAnother(e, family)
				})()
			})
		})
	})
	e.t.Run("Rekey", noRekeying("Istio's ztunnel"))
}
