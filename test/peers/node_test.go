// SPDX-License-Identifier: Apache-2.0

package peers

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/peer"
	"github.com/culvert-mesh/culvert/internal/testca"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

// nodeBinary is the system's, or what PEER_NODE names.
func nodeBinary(t *testing.T) string {
	t.Helper()
	name := os.Getenv("PEER_NODE")
	if name == "" {
		name = "node"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		peer.Absent(t, fmt.Sprintf("no Node.js here: install nodejs, or name its binary by PEER_NODE (%v)", err))
	}
	return path
}

// nodejs is a running node.js, the file beside this one.
type nodejs struct {
	*lab.Process
	pod     *lab.Pod
	version string
	orders  io.Writer
	said    string // the file of what it says
	read    int    // bytes of it
}

func startNode(e *env, binary string, p *lab.Pod, name string, config object) *nodejs {
	e.t.Helper()
	script, err := filepath.Abs("node.js")
	e.must(err)
	b, err := json.Marshal(config)
	e.must(err)
	n := &nodejs{pod: p, said: filepath.Join(p.Node.Dir, "peer-node-"+name+".said.log")}
	f, err := os.Create(n.said)
	e.must(err)
	defer f.Close() // the child has its own
	// Its standard input is open for as long as the test is.
	r, w, err := os.Pipe()
	e.must(err)
	defer r.Close()
	e.t.Cleanup(func() { w.Close() })
	cmd := exec.Command(binary, script, string(b))
	cmd.Stdin, cmd.Stdout = r, f
	n.orders, n.Process = w, e.open(p, "node-"+name, cmd)
	v := n.hears(e, "ready", nil)
	n.version = fmt.Sprint(v["node"])
	e.t.Logf("Node.js %v, nghttp2 %v, OpenSSL %v", v["node"], v["nghttp2"], v["openssl"])
	return n
}

// hears waits for the next event of a kind that has these fields.
func (n *nodejs) hears(e *env, event string, fields object) (found object) {
	e.t.Helper()
	at := n.read
	e.must(lab.Until(e.ctx, fmt.Sprintf("Node.js says %s %v", event, fields), func() error {
		b, err := os.ReadFile(n.said)
		if err != nil {
			return err
		}
		for rest := string(b[at:]); ; {
			line, after, whole := strings.Cut(rest, "\n")
			if !whole {
				return fmt.Errorf("it has said %q", b[at:])
			}
			rest = after
			found = nil
			if err := json.Unmarshal([]byte(line), &found); err != nil {
				return err
			}
			same := found["event"] == event
			for k, v := range fields {
				same = same && fmt.Sprint(found[k]) == fmt.Sprint(v)
			}
			if same {
				n.read = len(b) - len(rest)
				return nil
			}
		}
	}, n.Ended, lab.Within(patience())))
	return found
}

// is tells it to do something, and waits until it has.
func (n *nodejs) is(e *env, order string) {
	e.t.Helper()
	_, err := fmt.Fprintf(n.orders, "{\"do\":%q}\n", order)
	e.must(err)
	n.hears(e, "done", object{"do": order})
}

// theirEnds are the ways in which Node.js has a session end. After a GOAWAY alone it
// neither closes it nor reads on once its last stream has ended, so ours has to.
var theirEnds = []string{"close", "goaway"}

// sessionEnds is goesOn, and wants our end of the session that drains to be closed
// with its last stream.
func (n *nodejs) sessionEnds(e *env, w *way, family int, drain func()) {
	e.t.Helper()
	n.is(e, "close") // what others have left
	n.sessions(e, family, 0)
	w.carries(e, family)
	end := w.goesOn(e, family, drain)
	n.sessions(e, family, 2) // one that drains, and another
	end()
	n.sessions(e, family, 1)
}

// sessions waits until so many sockets of our pod are connected from or to the
// tunnel's port, with this pod.
func (n *nodejs) sessions(e *env, family, want int) {
	e.t.Helper()
	e.must(lab.Until(e.ctx, fmt.Sprintf("our pod has %d sessions with Node.js", want), func() error {
		all, err := sockdiag.List(e.ours.NS, 1<<unix.BPF_TCP_ESTABLISHED)
		if err != nil {
			return err
		}
		found := 0
		for _, s := range all {
			if s.Remote.Addr() == n.pod.Addr(family) && (s.Local.Port() == hbonePort || s.Remote.Port() == hbonePort) {
				found++
			}
		}
		if found != want {
			return fmt.Errorf("it has %d", found)
		}
		return nil
	}, lab.Within(patience())))
}

// TestNodeClient: Node.js as client of our server.
func TestNodeClient(t *testing.T) {
	binary := nodeBinary(t)
	e := setup(t)
	e.start(denying(e))
	app := serve(e, e.ours)
	certs := clientFiles(e)
	var ks, rs list
	for _, family := range []int{4, 6} {
		for _, kind := range kinds {
			ks = append(ks, object{
				"name": named(kind, family), "at": netip.AddrPortFrom(e.ours.Addr(family), hbonePort).String(),
				"files": certs[kind], "expect": expected(e, kind),
			})
		}
	}
	for _, r := range routes(e) {
		rs = append(rs, object{"name": r.name, "cluster": r.cluster, "authority": r.authority})
	}
	n := startNode(e, binary, e.theirs, "client", object{"kinds": ks, "routes": rs, "first": firstPort})
	e.listening(e.theirs, portOf(e, named("own", 6)), n.Process) // the last of them
	good := by(app, "good")
	good.converse(e)
	e.t.Run("RefusedConnect", func(t *testing.T) {
		families(e.in(t), func(e *env, family int) {
			for _, r := range refusals {
				watch := e.watch("inbound")
				if err := by(app, r.route).sees(e, family); !lab.IsReset(err) {
					e.t.Errorf("%s: the application saw %v, want a reset", r.route, err)
				}
				n.hears(e, "refused", object{"route": named(r.route, family), "status": r.status, "reason": r.reason})
				watch.ended(e, r.dst(e, family), r.reason)
			}
			good.carries(e, family) // the control
		})
	})
	e.t.Run("RefusedCertificate", func(t *testing.T) {
		families(e.in(t), func(e *env, family int) {
			// Ours refuses its: it hears which alert.
			watch := e.watch("inbound")
			if err := by(app, "unknown").sees(e, family); !lab.IsReset(err) {
				e.t.Errorf("the application saw %v, want a reset", err)
			}
			watch.refused(e, "reason=chain_validation_failed", "reporter=destination")
			n.hears(e, "failed", object{"route": named("unknown", family), "code": "ERR_SSL_TLSV1_ALERT_UNKNOWN_CA"})
			// It refuses ours: after the handshake, and without an alert, so
			// that there is nothing for us to report.
			if err := by(app, "elsewhere").sees(e, family); !lab.IsReset(err) {
				e.t.Errorf("the application saw %v, want a reset", err)
			}
			n.hears(e, "error", object{"kind": named("elsewhere", family), "message": "is " + e.ours.Identity()})
			good.carries(e, family) // the control
		})
	})
	e.t.Run("GoAway", func(t *testing.T) {
		t.Run("ours", func(t *testing.T) {
			families(e.in(t), func(e *env, family int) {
				kind := named("short", family)
				e.certificate("short", e.ca, e.ca, e.theirs.Identity(), testca.ValidFor(short))
				by(app, "short").goesOn(e, family, func() { // at the end of the client's certificate
					n.hears(e, "goaway", object{"kind": kind, "code": 0})
					e.certificate("short", e.ca, e.ca, e.theirs.Identity())
				})()
				n.hears(e, "closed", object{"kind": kind})
			})
		})
		for _, order := range theirEnds {
			t.Run("theirs/"+order, func(t *testing.T) {
				families(e.in(t), func(e *env, family int) {
					n.sessionEnds(e, good, family, func() { n.is(e, order) })
				})
			})
		}
	})
	e.t.Run("Rekey", noRekeying("Node.js"))
}

// TestNodeServer: Node.js as server for our client.
func TestNodeServer(t *testing.T) {
	binary := nodeBinary(t)
	e := setup(t)
	e.start(nil)
	app := serve(e, e.theirs)
	statuses := object{}
	for _, a := range answers {
		if a.status != 0 {
			statuses[fmt.Sprint(a.port)] = a.status
		}
	}
	start := func(p *lab.Pod, name string, f files, expect string) *nodejs {
		n := startNode(e, binary, p, name, object{"server": object{"port": hbonePort, "files": f, "expect": expect, "statuses": statuses}})
		e.listening(p, netip.AddrPortFrom(loopback, hbonePort), n.Process)
		return n
	}
	id, expect := e.theirs.Identity(), e.ours.Identity()
	start(e.theirs, "server", e.certificate("server", e.ca, e.ca, id), expect)
	good := to(app)
	good.converse(e)
	e.t.Run("RefusedConnect", func(t *testing.T) { good.refusedByAnswers(e.in(t)) })
	e.t.Run("RefusedCertificate", func(t *testing.T) {
		says := map[string]struct {
			event  string
			fields object
		}{
			"somebody":  {"tls", object{"code": "ERR_SSL_TLSV1_ALERT_ACCESS_DENIED"}},
			"unknown":   {"tls", object{"code": "ERR_SSL_TLSV1_ALERT_UNKNOWN_CA"}},
			"distrusts": {"tls", nil},
			"expects":   {"stranger", object{"who": expect}},
		}
		for _, s := range strangers(e) {
			t.Run(s.name, func(t *testing.T) {
				n := start(s.pod, s.name, s.files, s.expects)
				defer n.Kill()
				families(e.in(t), func(e *env, family int) {
					s.fails(e, family, "", func() { n.hears(e, says[s.name].event, says[s.name].fields) })
				})
			})
		}
		families(e.in(t), good.carries) // the control
	})
	e.t.Run("GoAway", func(t *testing.T) { // of a pod of its own, with one session
		e := e.in(t)
		p := e.Pod(1, 2)
		fresh := to(serve(e, p))
		n := start(p, "fresh", e.certificate("fresh", e.ca, e.ca, p.Identity()), expect)
		fresh.losesEnd = strings.HasPrefix(n.version, "v18.") // seen on 18.20, not on 20.20
		t.Run("ours", func(t *testing.T) {
			families(e.in(t), func(e *env, family int) {
				e.certificate("fresh", e.ca, e.ca, p.Identity(), testca.ValidFor(short))
				n.is(e, "renew")
				fresh.goesOn(e, family, func() { // at the end of the server's certificate
					e.certificate("fresh", e.ca, e.ca, p.Identity())
					n.is(e, "renew")
					n.hears(e, "goaway", object{"code": 0})
				})()
				n.hears(e, "closed", nil)
			})
		})
		for _, order := range theirEnds {
			t.Run("theirs/"+order, func(t *testing.T) {
				families(e.in(t), func(e *env, family int) {
					n.sessionEnds(e, fresh, family, func() {
						n.is(e, order)
						fresh.untilAnother(e, family)
					})
				})
			})
		}
	})
	e.t.Run("Rekey", noRekeying("Node.js"))
}
