// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/peer"
)

// startEnvoy starts one that sends back what it gets by TLS, and that passes on
// by TLS what it gets without, each at a socket of a directory. Its TLS is
// BoringSSL.
func startEnvoy(t *testing.T, a *authority, id *identity.SVID) (echo, plain, onward string) {
	t.Helper()
	binary := peer.Envoy(t)
	dir, err := os.MkdirTemp("", "envoy") // of a short name, as sockets need
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	echo, plain, onward = filepath.Join(dir, "echo"), filepath.Join(dir, "plain"), filepath.Join(dir, "onward")
	type object = map[string]any
	typed := func(name string, fields object) object {
		fields["@type"] = "type.googleapis.com/envoy.extensions." + name
		return object{"name": name, "typed_config": fields}
	}
	cert, key, root := a.writePEM(id)
	common := object{
		"tls_params":         object{"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
		"alpn_protocols":     []any{"h2"},
		"tls_certificates":   []any{object{"certificate_chain": object{"filename": cert}, "private_key": object{"filename": key}}},
		"validation_context": object{"trusted_ca": object{"filename": root}},
	}
	at := func(path string) object { return object{"pipe": object{"path": path}} }
	listener := func(path string, chain object) object {
		return object{"name": filepath.Base(path), "address": at(path), "filter_chains": []any{chain}}
	}
	config, err := json.Marshal(object{"static_resources": object{
		"listeners": []any{
			listener(echo, object{
				"transport_socket": typed("transport_sockets.tls.v3.DownstreamTlsContext", object{"common_tls_context": common, "require_client_certificate": true}),
				"filters":          []any{typed("filters.network.echo.v3.Echo", object{})},
			}),
			listener(plain, object{"filters": []any{
				typed("filters.network.tcp_proxy.v3.TcpProxy", object{"stat_prefix": "onward", "cluster": "onward"}),
			}}),
		},
		"clusters": []any{object{
			"name": "onward", "type": "STATIC",
			"load_assignment": object{"cluster_name": "onward", "endpoints": []any{object{
				"lb_endpoints": []any{object{"endpoint": object{"address": at(onward)}}},
			}}},
			"transport_socket": typed("transport_sockets.tls.v3.UpstreamTlsContext", object{"common_tls_context": common}),
		}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	cmd := exec.CommandContext(ctx, binary, "--config-yaml", string(config), "--disable-hot-restart", "--concurrency", "1", "--log-level", "warn")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		cmd.Wait()
		if t.Failed() {
			t.Logf("Envoy: %s", said.String())
		}
	})
	return echo, plain, onward
}

// dialEnvoy connects once Envoy listens.
func dialEnvoy(t *testing.T, path string) net.Conn {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; {
		c, err := net.Dial("unix", path)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			c.SetDeadline(time.Now().Add(20 * time.Second))
			return c
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// TestEnvoyRekeys: BoringSSL, in either role, takes our new keys, and makes its
// own where we ask.
func TestEnvoyRekeys(t *testing.T) {
	roles(t, func(t *testing.T, weServe bool) {
		a := newAuthority(t, meshTD)
		var (
			s   *stream
			r   *Result
			err error
			// there and back tell what goes through Envoy.
			there = func(text string) { s.send(t, text); s.expect(t, text) }
		)
		if weServe {
			_, plain, onward := startEnvoy(t, a, a.svid(clientID))
			l, err := net.Listen("unix", onward)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			app := dialEnvoy(t, plain)
			l.(*net.UnixListener).SetDeadline(time.Now().Add(20 * time.Second))
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if r, err = Server(context.Background(), c, a.server()); err != nil {
				t.Fatal(err)
			}
			s = newStream(t, c, r)
			there = func(text string) {
				t.Helper()
				s.send(t, text)
				b := make([]byte, len(text))
				for n := 0; n < len(b); {
					k, err := app.Read(b[n:])
					if err != nil {
						t.Fatal(err)
					}
					n += k
				}
				if _, err := app.Write(b); err != nil {
					t.Fatal(err)
				}
				s.expect(t, text)
			}
		} else {
			echo, _, _ := startEnvoy(t, a, a.svid(serverID))
			c := dialEnvoy(t, echo)
			if r, err = Client(context.Background(), c, a.client()); err != nil {
				t.Fatal(err)
			}
			s = newStream(t, c, r)
		}
		theirs := bytes.Clone(r.Secrets.Read)
		there("with the first keys")
		s.raw(t, s.l.UpdateKeys(nil, false))
		there("with our second keys")
		s.raw(t, s.l.UpdateKeys(nil, true))
		there("with our third keys, and an answer asked for")
		there("behind the answer")
		state := s.l.Freeze()
		if state.Asked || bytes.Equal(state.Read.Secret, theirs) {
			t.Errorf("Envoy has not answered: asked %v, its keys are the first: %v", state.Asked, bytes.Equal(state.Read.Secret, theirs))
		}
	})
}
