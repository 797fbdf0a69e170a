// SPDX-License-Identifier: Apache-2.0

package peers

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/proxy"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
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
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	e.must(err)
	c, err := e.ca.SignKey(&x509.Certificate{
		DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, key.Public(), false)
	e.must(err)
	l, err := p.Listen("tcp", fmt.Sprintf(":%d", caPort))
	e.must(err)
	server := &http.Server{
		Handler: issuing(e.ca), ReadHeaderTimeout: patience(),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{PrivateKey: key, Certificate: [][]byte{c.Raw, e.ca.Intermediate.Raw}}}},
	}
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

// issuing is gRPC's CreateCertificate: a CSR in, a chain out. Nobody has to prove
// anything.
func issuing(ca *testca.CA) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := func(chain []byte, err error) {
			w.Header().Set("Content-Type", "application/grpc")
			status, message := "0", ""
			if err != nil {
				status, message, chain = "13", err.Error(), nil // INTERNAL
			} else {
				chain = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(chain))), chain...)
			}
			_, _ = w.Write(chain)
			w.Header().Set(http.TrailerPrefix+"Grpc-Status", status)
			w.Header().Set(http.TrailerPrefix+"Grpc-Message", message)
		}
		b, err := io.ReadAll(io.LimitReader(r.Body, 64<<10))
		if err != nil {
			answer(nil, err)
			return
		}
		answer(issue(ca, b))
	})
}

// issue reads IstioCertificateRequest, whose field 1 is a CSR in PEM, out of a
// gRPC message, and makes IstioCertificateResponse, whose field 1 is repeated: a
// chain in PEM, the root last.
func issue(ca *testca.CA, message []byte) ([]byte, error) {
	const prefix = 5 // compressed or not, and the length
	if len(message) < prefix || message[0] != 0 {
		return nil, errors.New("no plain gRPC message")
	}
	message = message[prefix:]
	n, size := uint64(0), 0
	if len(message) > 0 && message[0] == 1<<3|2 {
		n, size = binary.Uvarint(message[1:])
	}
	if size <= 0 || n > uint64(len(message)-1-size) {
		return nil, errors.New("no CSR in front")
	}
	block, _ := pem.Decode(message[1+size:][:n])
	if block == nil {
		return nil, errors.New("the CSR is not PEM")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	leaf, err := ca.SignKey(&x509.Certificate{
		URIs: csr.URIs, NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, csr.PublicKey, false)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, c := range []*x509.Certificate{leaf, ca.Intermediate, ca.Root} {
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		out = append(binary.AppendUvarint(append(out, 1<<3|2), uint64(len(text))), text...)
	}
	return out, nil
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

// TestIssuing: the authority that Istio's ztunnel asks answers as it expects.
func TestIssuing(t *testing.T) {
	e := setup(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	e.must(err)
	svid, err := e.ca.SVID(spiffeid.RequireFromString(e.theirs.Identity()))
	e.must(err)
	good, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: svid.Certificates[0].URIs}, key)
	e.must(err)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good})
	body := append(binary.AppendUvarint([]byte{1<<3 | 2}, uint64(len(text))), text...)
	message := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
	out, err := issue(e.ca, message)
	e.must(err)
	for i := range 3 {
		n, size := binary.Uvarint(out[1:])
		block, rest := pem.Decode(out[1+size:][:n])
		if out[0] != 1<<3|2 || block == nil || len(rest) != 0 {
			t.Fatalf("field %d is no certificate", i)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		e.must(err)
		if i == 0 && (len(c.URIs) != 1 || c.URIs[0].String() != e.theirs.Identity()) {
			t.Errorf("the leaf is %v's", c.URIs)
		}
		out = out[1+size+int(n):]
	}
	for _, bad := range [][]byte{nil, message[:5], message[:len(message)-1], append([]byte{1}, message[1:]...)} {
		if _, err := issue(e.ca, bad); err == nil {
			t.Errorf("%d bytes that are no request are answered", len(bad))
		}
	}
}
