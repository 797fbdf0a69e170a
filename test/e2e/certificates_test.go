// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/identity/ca"
	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// soak makes TestRenewalUnderLoad long: `make soak`.
const soak = "CULVERT_SOAK"

// trustFile is what the daemons of identified have as trust file.
func trustFile(n *lab.Node) string { return filepath.Join(n.Dir, "trust.yaml") }

func caDir(n *lab.Node) string { return filepath.Join(n.Dir, "ca") }

// nobody is a trust file that changes nothing.
const nobody = "deny: {ids: [spiffe://" + lab.TrustDomain + "/ns/none/sa/none]}\n"

// identified is a mesh whose certificates live for life, with a trust file.
func identified(t *testing.T, life time.Duration, before func(*env)) (*env, []*lab.Daemon) {
	t.Helper()
	e := setup(t)
	if before != nil {
		before(e)
	}
	var daemons []*lab.Daemon
	for _, n := range e.Nodes {
		e.must(os.WriteFile(trustFile(n), []byte(nobody), 0o600))
		daemons = append(daemons, e.startOn(n, lab.DaemonConfig{Settings: map[string]any{"identity": map[string]any{
			"ca":        map[string]any{"dir": caDir(n), "leafTTL": life.String()},
			"trustFile": trustFile(n),
		}}}))
	}
	return e, daemons
}

// setTrust replaces the daemons' trust files and waits until they are in force.
func (e *env) setTrust(text string, ds ...*lab.Daemon) {
	e.t.Helper()
	for _, d := range ds {
		e.reloads(d, "trust", "ok", func() { e.replace(d.Node, "trust.yaml", text) })
	}
}

// presented is the chain that a workload shows to a peer.
func (e *env) presented(by *testca.CA, from, to *lab.Pod) []*x509.Certificate {
	e.t.Helper()
	s, err := e.session(from, to.Addr(4), peerTLS(e.svid(by, from.Identity())))
	e.must(err)
	defer s.NetConn().Close()
	return s.ConnectionState().PeerCertificates
}

// TestRenewalUnderLoad: certificates are renewed, and end, several times under
// requests, and none fails.
func TestRenewalUnderLoad(t *testing.T) {
	userSpace(t)
	life, whole, rate := 4*time.Second, 15*time.Second, 100
	soaking := os.Getenv(soak) != ""
	if soaking {
		life, whole, rate = 20*time.Second, 5*time.Minute, 510 // 500 and what beginning and end cost
	}
	e, d := identified(t, life, nil)
	e.takes(whole + time.Minute)
	observer := e.authority()
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)

	serials := map[string]bool{}
	look := func() string {
		leaf := e.presented(observer, e.Pod(1, 3), e.Pod(2, 1))[0]
		if left := time.Until(leaf.NotAfter); left <= 0 {
			t.Errorf("a certificate is presented whose time is over since %s", -left)
		}
		serials[leaf.SerialNumber.Text(16)] = true
		return leaf.SerialNumber.Text(16)
	}
	before := look()
	sessions := e.sum(d[0], successes)
	load := e.requests(e.Pod(1, 1), app.Addr(4), rate)
	for end := time.After(whole); end != nil; {
		select {
		case <-end:
			end = nil
		case <-time.After(life / 4):
			look()
		}
	}
	load.whole(t, int64(whole/scaled(time.Second))*int64(rate)/2*8/10)
	if n := load.kept.Load() + load.single.Load(); soaking && lab.Slowness() == 1 && n < 150_000 {
		t.Errorf("%d requests in %v, want 150,000: the machine is too slow, or busy", n, whole)
	}
	after := look()
	if before == after {
		t.Error("the serial numbers before and after are the same")
	}
	sessions = e.sum(d[0], successes) - sessions
	t.Logf("%d certificates were seen, from serial %s to %s; %v sessions were opened by the client's node", len(serials), before, after, sessions)
	if want := int(whole / life); len(serials) < want || int(sessions) < want {
		t.Errorf("%d certificates and %v sessions in %s of lives of %s, want %d of each: nothing was renewed", len(serials), sessions, whole, life, want)
	}
	for _, d := range d {
		if n := e.sum(d, failures); n != 0 {
			t.Errorf("%v handshakes of %s failed", n, d.Node.Name)
		}
	}
}

// endsIn gives a node's authority an intermediate that ends in d; 0: a good one.
func (e *env) endsIn(n *lab.Node, d time.Duration) {
	e.t.Helper()
	td := spiffeid.RequireTrustDomainFromString(lab.TrustDomain)
	e.must(os.RemoveAll(filepath.Join(n.Dir, "next")))
	next := filepath.Join(n.Dir, "next")
	e.must(ca.NewIntermediate(e.RootDir(), next, td, time.Now()))
	if d > 0 {
		// As one that was made so long ago.
		life := time.Until(certificates(e, filepath.Join(next, "intermediate.pem"))[0].NotAfter)
		e.must(os.RemoveAll(next))
		e.must(ca.NewIntermediate(e.RootDir(), next, td, time.Now().Add(d-life)))
	}
	e.copyCA(next, n, "intermediate.key", "intermediate.pem")
}

// copyCA puts files of one authority into a node's, each at once.
func (e *env) copyCA(dir string, n *lab.Node, names ...string) {
	e.t.Helper()
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(dir, name))
		e.must(err)
		e.replace(n, filepath.Join("ca", name), string(b))
	}
}

func certificates(e *env, path string) []*x509.Certificate {
	e.t.Helper()
	b, err := os.ReadFile(path)
	e.must(err)
	var out []*x509.Certificate
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		e.must(err)
		out = append(out, c)
	}
	return out
}

// TestStoppedAuthority: past the life of the last certificate that a node could
// make nothing new is carried, with the reason at the end whose certificate it is;
// what is open goes on, and it recovers by itself.
func TestStoppedAuthority(t *testing.T) {
	userSpace(t)
	for name, side := range map[string]struct {
		node     int
		reporter string
		detail   string // in the client's access log; what its server says is no more than an end
	}{"client": {1, "source", "certificate_expired: "}, "server": {2, "destination", ""}} {
		t.Run(name, func(t *testing.T) {
			var over time.Time
			life := 4 * time.Second
			if os.Getenv(soak) != "" {
				life = 20 * time.Second
			}
			e, d := identified(t, life, func(e *env) {
				for _, n := range e.Nodes {
					e.must(n.Configure(lab.DaemonConfig{})) // makes the authorities
				}
				e.endsIn(e.Nodes[side.node-1], scaled(life+time.Second))
				over = certificates(e, filepath.Join(caDir(e.Nodes[side.node-1]), "intermediate.pem"))[0].NotAfter
			})
			stopped := d[side.node-1]
			app, err := e.Pod(2, 1).Echo(8080)
			e.must(err)
			held := e.connect(e.Pod(1, 1), app.Addr(4))
			e.must(held.SetDeadline(time.Now().Add(scaled(time.Minute)))) // it outlives the authority
			e.must(exchange(held, "before"))
			e.must(e.call(e.Pod(1, 1), app.Addr(4))) // the control: before its end
			if n := e.sum(stopped, failures); n != 0 || time.Now().After(over) {
				t.Fatalf("control: %v handshakes have failed before the end at %s", n, over)
			}

			<-time.After(time.Until(over.Add(1500 * time.Millisecond)))
			expired := time.Now()
			reached := len(app.Peers())
			for _, family := range []int{4, 6} {
				if err := e.call(e.Pod(1, 1), app.Addr(family)); !isReset(err) && !errors.Is(err, io.EOF) {
					t.Errorf("a call without a certificate: %v, want a reset", err)
				}
			}
			if n := len(app.Peers()) - reached; n != 0 {
				t.Errorf("%d calls reached the application", n)
			}
			e.must(lab.Until(e.ctx, "the reason is counted", func() error {
				if e.sum(stopped, failures, "reason", string(identity.ReasonCertificateExpired), "reporter", side.reporter) < 2 {
					return errors.New("it is not")
				}
				return nil
			}))
			_, err = d[0].WaitAccessLog(e.ctx, 2, func(l lab.Entry) bool {
				return l.String("reason") == "tunnel_lost" && strings.Contains(l.String("detail"), side.detail)
			})
			e.must(err)
			e.must(exchange(held, "meanwhile"))

			e.endsIn(stopped.Node, 0)
			back := time.Now()
			e.must(lab.Until(e.ctx, "calls are carried again", func() error { return e.call(e.Pod(1, 1), app.Addr(4)) }, stopped.Ended))
			e.must(exchange(held, "after"))
			t.Logf("lives of %v; the authority's end was %v before the refusals, %v of them are counted as %s; carried again %v after it had a new intermediate",
				life, expired.Sub(over).Round(time.Millisecond), e.sum(stopped, failures, "reason", string(identity.ReasonCertificateExpired)), identity.ReasonCertificateExpired, time.Since(back).Round(time.Millisecond))
		})
	}
}

// TestRootRotation: another root takes the first one's place under requests: first
// both are trusted, then the new one signs, then the old one goes. Nothing restarts,
// and no request fails.
func TestRootRotation(t *testing.T) {
	userSpace(t)
	e, d := identified(t, 4*time.Second, nil)
	td := spiffeid.RequireTrustDomainFromString(lab.TrustDomain)
	old := e.authority()
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	fresh, err := e.Pod(2, 2).Echo(8080)
	e.must(err)
	next := filepath.Join(e.Dir, "next-root")
	e.must(ca.Init(next, td, time.Now()))
	root := certificates(e, filepath.Join(next, "root.pem"))[0]
	load := e.requests(e.Pod(1, 1), app.Addr(4), 100)
	knock := func() error {
		return e.ask(e.Pod(1, 3), peerTLS(e.svid(old, e.Pod(1, 3).Identity())), app.Addr(4))
	}
	e.must(knock()) // the control: the old root is good

	// Both are trusted, by the trust file.
	e.setTrust(trustRoots(lab.TrustDomain, writeRoot(e, filepath.Join(e.Dir, "next.pem"), root)), d...)
	// The new one signs, on one node after the other.
	both, err := os.ReadFile(filepath.Join(e.RootDir(), "root.pem"))
	e.must(err)
	only, err := os.ReadFile(filepath.Join(next, "root.pem"))
	e.must(err)
	both = append(both, only...)
	for i, n := range e.Nodes {
		node := filepath.Join(n.Dir, "next")
		e.must(ca.NewIntermediate(next, node, td, time.Now()))
		e.replace(n, "ca/root.pem", string(both))
		e.copyCA(node, n, "intermediate.key", "intermediate.pem")
		to := n.Pods[0]
		e.must(lab.Until(e.ctx, n.Name+" presents certificates of the new root", func() error {
			chain := e.presented(old, e.Pod(1, 3), to)
			if err := chain[len(chain)-1].CheckSignatureFrom(root); err != nil {
				return err
			}
			return nil
		}, d[i].Ended))
		if i == 0 { // a new session: the other node knows the new root by its trust file only
			e.must(e.call(e.Pod(1, 2), fresh.Addr(4)))
		}
	}
	// What lives still is of the old root, for a life at most.
	<-time.After(5 * time.Second)
	e.must(knock()) // still trusted
	// The old one goes.
	for _, n := range e.Nodes {
		e.replace(n, "ca/root.pem", string(only))
	}
	e.setTrust(nobody, d...)
	e.must(lab.Until(e.ctx, "the old root is refused", func() error {
		if err := knock(); alert(err) == "" {
			return fmt.Errorf("a client with its certificate heard %v", err)
		}
		return nil
	}))
	if n := e.sum(d[1], failures, "reason", string(identity.ReasonChainValidationFailed)); n == 0 {
		t.Error("the refusal was not counted")
	}
	load.whole(t, int64(200*time.Second/scaled(time.Second)))
	for _, d := range d {
		e.must(d.Ended())
	}
}

// TestRevocation: a deny list takes effect without a restart, on what is open too,
// and a broken one changes nothing.
func TestRevocation(t *testing.T) {
	userSpace(t)
	e, d := identified(t, time.Hour, nil)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	denied, other := e.Pod(1, 1), e.Pod(1, 2)
	deny := func(p *lab.Pod) string { return "deny: {ids: [" + p.Identity() + "]}\n" }
	a, b := e.connect(denied, app.Addr(4)), e.connect(other, app.Addr(4))
	e.must(exchange(a, "before"))
	e.must(exchange(b, "before"))

	gone := func(c net.Conn, what string) {
		t.Helper()
		_ = c.SetReadDeadline(time.Now().Add(patience()))
		if _, err := io.ReadAll(c); !isReset(err) {
			t.Errorf("%s ended with %v, want a reset", what, err)
		}
	}
	// By the server's node.
	e.setTrust(deny(denied), d[1])
	gone(a, "the live connection of a revoked client")
	e.must(exchange(b, "meanwhile")) // the control: another's
	if err := e.call(denied, app.Addr(4)); err == nil {
		t.Error("a revoked client is served")
	}
	if n := e.sum(d[1], failures, "reason", string(identity.ReasonRevoked), "reporter", "destination"); n == 0 {
		t.Error("the refusal was not counted")
	}
	// A broken file changes nothing.
	e.reloads(d[1], "trust", "error", func() { e.replace(d[1].Node, "trust.yaml", "deny: {ids: [nobody]}\n") })
	if err := e.call(denied, app.Addr(4)); err == nil {
		t.Error("with a broken trust file a revoked client is served")
	}
	e.must(exchange(b, "broken"))
	// Nor does an emptied one, not even when it is told to be read.
	e.reloads(d[1], "trust", "error", func() { e.replace(d[1].Node, "trust.yaml", "") })
	e.reloads(d[1], "trust", "error", func() { e.must(d[1].Signal(syscall.SIGHUP)) })
	if err := e.call(denied, app.Addr(4)); err == nil {
		t.Error("with an emptied trust file a revoked client is served")
	}
	e.must(exchange(b, "emptied"))
	// Taken off the list.
	e.setTrust(nobody, d[1])
	e.must(e.call(denied, app.Addr(4)))
	e.must(exchange(b, "again"))
	// By the client's node, by serial number.
	serial := e.presented(e.authority(), e.Pod(1, 3), e.Pod(2, 1))[0].SerialNumber.Text(16)
	e.setTrust("deny: {serials: ['"+serial+"']}\n", d[0])
	gone(b, "the live connection to a revoked server")
	if err := e.call(other, app.Addr(4)); err == nil {
		t.Error("a revoked server is called")
	}
	if n := e.sum(d[0], failures, "reason", string(identity.ReasonRevoked), "reporter", "source"); n == 0 {
		t.Error("the client's refusal was not counted")
	}
}
