// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

var suites = []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256}

// openssl is a running openssl command.
type openssl struct {
	t     *testing.T
	stdin io.WriteCloser
	done  chan struct{}

	mu   sync.Mutex // guards out
	cond *sync.Cond
	out  bytes.Buffer // both of its outputs
}

func (o *openssl) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	defer o.cond.Broadcast()
	return o.out.Write(p)
}

func startOpenSSL(t *testing.T, args ...string) *openssl {
	t.Helper()
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Fatal("this test talks to OpenSSL 3: the openssl command is missing")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	cmd := exec.CommandContext(ctx, path, args...)
	o := &openssl{t: t, done: make(chan struct{})}
	o.cond = sync.NewCond(&o.mu)
	cmd.Stdout, cmd.Stderr = o, o
	if o.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		o.mu.Lock()
		close(o.done)
		o.cond.Broadcast()
		o.mu.Unlock()
	}()
	t.Cleanup(func() {
		cancel()
		<-o.done
		if t.Failed() {
			t.Logf("openssl %s:\n%s", strings.Join(args, " "), o.out.String())
		}
	})
	return o
}

func (o *openssl) text() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.out.String()
}

// wait waits until the output holds what for the n-th time.
func (o *openssl) wait(what string, n int) {
	o.t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	for strings.Count(o.out.String(), what) < n {
		select {
		case <-o.done:
			o.t.Fatalf("openssl ended without %q", what)
		default:
		}
		o.cond.Wait()
	}
}

func (o *openssl) say(s string) {
	o.t.Helper()
	if _, err := io.WriteString(o.stdin, s); err != nil {
		o.t.Fatal(err)
	}
}

// peerArgs are the options that both commands share.
func peerArgs(a *authority, id spiffeid.ID, suite uint16) []string {
	cert, key, root := a.writePEM(a.svid(id))
	args := []string{"-tls1_3", "-alpn", "h2", "-msg", "-cert", cert, "-cert_chain", cert, "-key", key, "-CAfile", root, "-verify_return_error"}
	if suite != 0 {
		args = append(args, "-ciphersuites", tls.CipherSuiteName(suite))
	}
	return args
}

// serverOf starts s_server and returns a connection to it, on the loopback and a
// port of the kernel's choice (-unix ends OpenSSL 3.0 at the first connection).
func serverOf(t *testing.T, args ...string) (*openssl, net.Conn) {
	t.Helper()
	o := startOpenSSL(t, append([]string{"s_server", "-accept", "127.0.0.1:0", "-naccept", "1", "-Verify", "1"}, args...)...)
	o.wait("ACCEPT 127.0.0.1:", 1)
	o.wait("\n", 1+strings.Count(o.text(), "ACCEPT")) // the line is whole
	_, port, _ := strings.Cut(o.text(), "ACCEPT 127.0.0.1:")
	port, _, _ = strings.Cut(port, "\n")
	c, err := net.Dial("tcp", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return o, c
}

// clientOf starts s_client and returns its connection to us.
func clientOf(t *testing.T, args ...string) (*openssl, net.Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	o := startOpenSSL(t, append([]string{"s_client", "-unix", path}, args...)...)
	l.(*net.UnixListener).SetDeadline(time.Now().Add(20 * time.Second))
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return o, c
}

// connect makes a connection between us and OpenSSL, in either role.
func connect(t *testing.T, a *authority, weServe bool, suite uint16, more ...string) (*openssl, *stream, *Result) {
	t.Helper()
	var (
		o   *openssl
		c   net.Conn
		r   *Result
		err error
	)
	if weServe {
		o, c = clientOf(t, append(peerArgs(a, clientID, suite), more...)...)
		r, err = Server(context.Background(), c, a.server())
	} else {
		o, c = serverOf(t, append(peerArgs(a, serverID, suite), more...)...)
		r, err = Client(context.Background(), c, a.client())
	}
	if err != nil {
		t.Fatal(err)
	}
	return o, newStream(t, c, r), r
}

func roles(t *testing.T, run func(t *testing.T, weServe bool)) {
	t.Run("client", func(t *testing.T) { run(t, false) })
	t.Run("server", func(t *testing.T) { run(t, true) })
}

// Data, KeyUpdates asked for and not, in both directions, then close_notify,
// with tickets and padding of OpenSSL's in between.
func TestOpenSSL(t *testing.T) {
	for _, suite := range suites {
		t.Run(tls.CipherSuiteName(suite), func(t *testing.T) {
			roles(t, func(t *testing.T, weServe bool) {
				a := newAuthority(t, meshTD)
				o, s, r := connect(t, a, weServe, suite)
				if r.CipherSuite != suite {
					t.Fatalf("suite %s", tls.CipherSuiteName(r.CipherSuite))
				}
				if want := map[bool]spiffeid.ID{true: clientID, false: serverID}[weServe]; r.Peer.ID != want {
					t.Errorf("peer %v", r.Peer.ID)
				}
				const sent, received = ">>> TLS 1.3, Handshake [length 0005], KeyUpdate", "<<< TLS 1.3, Handshake [length 0005], KeyUpdate"

				s.send(t, "first of ours\n")
				o.wait("first of ours", 1)
				o.say("first of theirs\n")
				s.expect(t, "first of theirs\n")

				// Theirs, without and with a request.
				// s_server sends it at once, s_client with the next data.
				updated := func(n int) {
					if weServe {
						o.wait("KEYUPDATE", n)
					} else {
						o.wait(sent, n)
					}
				}
				o.say("k\n")
				updated(1)
				o.say("behind k\n")
				s.expect(t, "behind k\n")
				o.wait(sent, 1)
				if s.l.NeedsControl() {
					t.Error("k is answered")
				}
				o.say("K\n")
				updated(2)
				o.say("behind K\n")
				s.expect(t, "behind K\n")
				o.wait(sent, 2)
				if !s.l.NeedsControl() {
					t.Error("K is not answered")
				}
				s.send(t, "after the answer\n")
				o.wait(received, 1)
				o.wait("after the answer", 1)

				// Ours, without and with a request.
				s.raw(t, s.l.UpdateKeys(nil, false))
				s.send(t, "behind our first\n")
				o.wait(received, 2)
				o.wait("behind our first", 1)
				s.raw(t, s.l.UpdateKeys(nil, true))
				s.send(t, "behind our second\n")
				o.wait(received, 3)
				o.wait("behind our second", 1)
				o.say("last of theirs\n")
				s.expect(t, "last of theirs\n")
				o.wait(sent, 3)

				s.send(t, strings.Repeat("x", record.MaxPlaintext-1)+"\n")
				s.send(t, "behind a full record\n")
				o.wait("behind a full record", 1)

				// s_client says close_notify, s_server just closes: a truncation.
				want := errTruncated
				if weServe {
					want = io.EOF
				}
				o.say("Q\n")
				if err := s.end(t); err != want {
					t.Errorf("Q: %v, want %v", err, want)
				}
			})
		})
	}
}

// Padded records, and tickets that are split over several.
func TestOpenSSLPadding(t *testing.T) {
	a := newAuthority(t, meshTD)
	roles(t, func(t *testing.T, weServe bool) {
		o, s, _ := connect(t, a, weServe, 0, "-record_padding", "4096", "-max_send_frag", "512")
		long := strings.Repeat("0123456789abcde\n", 200)
		o.say("first\n")
		s.expect(t, "first\n")
		o.say(long)
		s.expect(t, long)
		s.send(t, "enough\n")
		o.wait("enough", 1)
	})
}

func TestOpenSSLGetsOurAlerts(t *testing.T) {
	a := newAuthority(t, meshTD)
	roles(t, func(t *testing.T, weServe bool) {
		o, s, _ := connect(t, a, weServe, 0)
		s.raw(t, s.l.AppendAlert(nil, record.AlertInternalError))
		o.wait("SSL alert number 80", 1)

		o, s, _ = connect(t, a, weServe, 0)
		s.raw(t, s.l.AppendAlert(nil, record.AlertCloseNotify))
		o.wait("<<< TLS 1.3, Alert [length 0002], warning close_notify", 1)
		if err := s.end(t); err != io.EOF {
			t.Errorf("the answer to close_notify: %v", err)
		}
	})
}

// A record that was changed on its way.
func TestOpenSSLRefusesAChangedRecord(t *testing.T) {
	a := newAuthority(t, meshTD)
	roles(t, func(t *testing.T, weServe bool) {
		_, s, _ := connect(t, a, weServe, 0)
		slot := make([]byte, record.SlotLen)
		n := s.l.Seal(slot, 100)
		slot[50] ^= 1
		s.raw(t, slot[:n])
		var pa *record.PeerAlert
		if err := s.end(t); !errors.As(err, &pa) || pa.Alert != record.AlertBadRecordMAC {
			t.Errorf("got %v, want bad_record_mac", err)
		}
	})
}

// OpenSSL's certificate is refused: it hears why, whether it is the server, which
// is told in the handshake's epoch, or the client, told in the application's.
func TestOpenSSLIsRefused(t *testing.T) {
	a := newAuthority(t, meshTD)
	roles(t, func(t *testing.T, weServe bool) {
		for _, suite := range suites {
			cfg := a.client()
			if weServe {
				cfg = a.server()
			}
			cfg.Verifier.Denied = func(*x509.Certificate, spiffeid.ID) (string, bool) { return "by a test", true }
			var o *openssl
			var err error
			if weServe {
				var c net.Conn
				o, c = clientOf(t, peerArgs(a, clientID, suite)...)
				_, err = Server(context.Background(), c, cfg)
			} else {
				var c net.Conn
				o, c = serverOf(t, peerArgs(a, serverID, suite)...)
				_, err = Client(context.Background(), c, cfg)
			}
			wantFailure(t, err, identity.ReasonRevoked)
			o.wait("SSL alert number 44", 1)
		}
	})
}

// OpenSSL refuses our certificate.
func TestOpenSSLRefuses(t *testing.T) {
	a, foreign := newAuthority(t, meshTD), newAuthority(t, meshTD)
	t.Run("client", func(t *testing.T) { // ours: it learns at the first record
		_, c := serverOf(t, peerArgs(a, serverID, 0)...)
		cfg := a.client()
		cfg.SVID = foreign.svid(clientID)
		r, err := Client(context.Background(), c, cfg)
		if err != nil {
			t.Fatal(err)
		}
		refusedAtFirstRecord(t, newStream(t, c, r), record.AlertUnknownCA)
	})
	t.Run("server", func(t *testing.T) {
		_, c := clientOf(t, peerArgs(a, clientID, 0)...)
		cfg := a.server()
		cfg.SVID = foreign.svid(serverID)
		_, err := Server(context.Background(), c, cfg)
		if d := wantFailure(t, err, identity.ReasonRefusedByPeer); d != "unknown_ca (sent unprotected)" {
			t.Errorf("detail %q", d)
		}
	})
}

// Only what crypto/tls and we have in common is spoken.
func TestOpenSSLWithoutCertificate(t *testing.T) {
	a := newAuthority(t, meshTD)
	_, _, root := a.writePEM(a.svid(clientID))
	o, c := clientOf(t, "-tls1_3", "-alpn", "h2", "-CAfile", root)
	_, err := Server(context.Background(), c, a.server())
	wantFailure(t, err, identity.ReasonNoCertificate)
	o.wait("SSL alert number 116", 1)
}

// A group that we do not offer a share for costs a HelloRetryRequest.
func TestOpenSSLHelloRetryRequest(t *testing.T) {
	a := newAuthority(t, meshTD)
	roles(t, func(t *testing.T, weServe bool) {
		o, s, r := connect(t, a, weServe, 0, "-groups", "P-384")
		if r.Group != tls.CurveP384 {
			t.Errorf("group %v", r.Group)
		}
		s.send(t, "hello\n")
		o.wait("hello", 1)
	})
}

// A client that would rather have AES-256-GCM, as rustls, gets AES-128-GCM from
// us, where there are AES instructions.
func TestOpenSSLPrefersAES256(t *testing.T) {
	a := newAuthority(t, meshTD)
	_, _, r := connect(t, a, true, 0, "-ciphersuites", "TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256")
	switch r.CipherSuite {
	case tls.TLS_AES_128_GCM_SHA256:
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		t.Log("no AES instructions here")
	default:
		t.Errorf("suite %s", tls.CipherSuiteName(r.CipherSuite))
	}
}
