// SPDX-License-Identifier: Apache-2.0

package peers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/net/proxy"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// Istio's own ztunnel, as what it calls a dedicated one: it has the pod to
// itself, knows the mesh by a file, takes what is to be carried by SOCKS5, and
// gets its certificate from an authority of this file's. Whoever changes this
// has to run it with a binary of theirs: none comes with the packages of any
// registry.

const (
	socksPort = 15080
	caPort    = 15012
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

// startZtunnel starts one for the foreign peer's pod.
func startZtunnel(e *env, binary string) {
	e.t.Helper()
	p := e.theirs
	root := serveCertificates(e, p)
	var workloads list
	for _, p := range e.Pods() {
		workloads = append(workloads, object{
			"uid": "Kubernetes//Pod/" + p.Namespace + "/" + p.Name, "name": p.Name, "namespace": p.Namespace,
			"serviceAccount": p.ServiceAccount, "trustDomain": lab.TrustDomain, "node": p.Node.Name,
			"workloadIps": p.Addrs(), "protocol": "HBONE", "network": "", "clusterId": "Kubernetes",
		})
	}
	b, err := json.Marshal(object{"workloads": workloads, "policies": list{}, "services": list{}})
	e.must(err)
	config := filepath.Join(e.Dir, "ztunnel.yaml") // which JSON is
	e.must(os.WriteFile(config, b, 0o600))
	cmd := exec.Command(binary, "proxy", "ztunnel")
	cmd.Dir = e.Dir
	cmd.Env = append(os.Environ(),
		"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO="+p.Namespace+"/"+p.Name+"/"+p.ServiceAccount, "INSTANCE_IP="+p.V4.String(),
		"NODE_NAME="+p.Node.Name, "CLUSTER_ID=Kubernetes", "LOCAL_XDS_PATH="+config, "XDS_ADDRESS=", "FAKE_CA=false",
		fmt.Sprintf("CA_ADDRESS=https://localhost:%d", caPort), "CA_ROOT_CA="+root, "UNSTABLE_ENABLE_SOCKS5=true",
	)
	proc := e.open(p, "ztunnel", cmd)
	e.listening(p, netip.AddrPortFrom(loopback, hbonePort), proc)
	e.listening(p, netip.AddrPortFrom(loopback, socksPort), proc)
}

// serveCertificates answers istio.v1.auth.IstioCertificateService in a pod, and
// returns the file of the root by which it is known itself.
func serveCertificates(e *env, p *lab.Pod) (root string) {
	e.t.Helper()
	server, err := e.ca.Istio(nil)
	e.must(err)
	l, err := p.Listen("tcp", fmt.Sprintf(":%d", caPort))
	e.must(err)
	done := make(chan error, 1)
	go func() { done <- server.ServeTLS(l, "", "") }()
	e.t.Cleanup(func() {
		server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			e.t.Error(err)
		}
	})
	return e.certificate("authority", e.ca, e.ca, p.Identity()).Root
}

// TestZtunnelClient: Istio's ztunnel as client of our server.
func TestZtunnelClient(t *testing.T) {
	binary := ztunnelBinary(t)
	e := setup(t)
	e.start(nil)
	app := serve(e, e.ours)
	startZtunnel(e, binary)
	by := func(port uint16) *way {
		return &way{direction: "inbound", app: app, dial: func(e *env, family int) (*net.TCPConn, error) {
			return socks(e, netip.AddrPortFrom(e.ours.Addr(family), port))
		}}
	}
	by(appPort).converse(e)
	e.t.Run("RefusedConnect", func(t *testing.T) {
		families(e.in(t), func(e *env, family int) {
			for _, port := range []uint16{closedPort, hbonePort} {
				watch := e.watch("inbound")
				if err := by(port).sees(e, family); err == nil {
					e.t.Errorf("port %d: the application saw a byte", port)
				}
				watch.ended(e, netip.AddrPortFrom(e.ours.Addr(family), port), "refused")
			}
			by(appPort).carries(e, family) // the control
		})
	})
}

// socks connects by the foreign ztunnel's SOCKS5 port.
func socks(e *env, to netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(e.ctx, patience())
	defer cancel()
	d, err := proxy.SOCKS5("tcp", netip.AddrPortFrom(loopback, socksPort).String(), nil, forward{e})
	if err != nil {
		return nil, err
	}
	c, err := d.(proxy.ContextDialer).DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// forward dials in the foreign peer's pod.
type forward struct{ e *env }

func (f forward) Dial(_, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	return connect(f.e, f.e.theirs, to)
}

func (f forward) DialContext(_ context.Context, network, address string) (net.Conn, error) {
	return f.Dial(network, address)
}

// TestZtunnelServer: Istio's ztunnel as server for our client.
func TestZtunnelServer(t *testing.T) {
	binary := ztunnelBinary(t)
	e := setup(t)
	e.start(nil)
	app := serve(e, e.theirs)
	startZtunnel(e, binary)
	good := to(app)
	good.converse(e)
	e.t.Run("RefusedConnect", func(t *testing.T) {
		families(e.in(t), func(e *env, family int) {
			watch, dst := e.watch("outbound"), netip.AddrPortFrom(e.theirs.Addr(family), closedPort)
			if err := sees(connect(e, e.ours, dst)); !lab.IsReset(err) {
				e.t.Errorf("the application saw %v, want a reset", err)
			}
			watch.ended(e, dst, "unreachable") // by its 503
			good.carries(e, family)            // the control
		})
	})
}
