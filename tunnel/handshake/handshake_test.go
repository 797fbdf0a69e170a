// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/tunnel/record"
)

func TestHandshake(t *testing.T) {
	a := newAuthority(t, meshTD)
	cc, sc := sockets(t)
	c, s := both(t, cc, sc, a.client(), a.server())
	if c.err != nil || s.err != nil {
		t.Fatalf("client: %v, server: %v", c.err, s.err)
	}
	if c.Peer.ID != serverID || s.Peer.ID != clientID {
		t.Errorf("client met %v, server met %v", c.Peer.ID, s.Peer.ID)
	}
	for _, r := range []*Result{c.Result, s.Result} {
		if r.Group != tls.X25519MLKEM768 {
			t.Errorf("group %v, want the hybrid one", r.Group)
		}
		if r.CipherSuite != r.Secrets.Suite || r.CipherSuite == 0 || r.Duration <= 0 {
			t.Errorf("%+v", r)
		}
	}
	if !c.Secrets.Client || s.Secrets.Client {
		t.Error("the roles are lost")
	}
	client, server := newStream(t, cc, c.Result), newStream(t, sc, s.Result)
	client.send(t, "ping")
	server.expect(t, "ping")
	server.send(t, strings.Repeat("x", record.MaxPlaintext))
	client.expect(t, strings.Repeat("x", record.MaxPlaintext))
	for range 3 {
		client.raw(t, client.l.UpdateKeys(nil, true))
		client.send(t, "after update")
		server.expect(t, "after update")
		server.send(t, "answered")
		client.expect(t, "answered")
	}
	client.raw(t, client.l.AppendAlert(nil, record.AlertCloseNotify))
	if err := server.end(t); err != io.EOF {
		t.Errorf("close_notify: %v", err)
	}
	sc.Close()
	if err := client.end(t); err != errTruncated {
		t.Errorf("close without close_notify: %v", err)
	}
}

// AES-128-GCM is the fastest, and what two of us agree on where the CPU has AES
// instructions.
func TestSuiteIsAES128OnThisHardware(t *testing.T) {
	a := newAuthority(t, meshTD)
	cc, sc := sockets(t)
	c, s := both(t, cc, sc, a.client(), a.server())
	if c.err != nil || s.err != nil {
		t.Fatalf("client: %v, server: %v", c.err, s.err)
	}
	switch c.CipherSuite {
	case tls.TLS_AES_128_GCM_SHA256:
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		t.Log("no AES instructions here")
	default:
		t.Errorf("suite %s", tls.CipherSuiteName(c.CipherSuite))
	}
}

// holding keeps what is written until it is let go.
type holding struct {
	net.Conn
	writes int
	held   []byte
}

func (h *holding) Write(p []byte) (int, error) {
	if h.writes++; h.writes == 1 { // the ClientHello
		return h.Conn.Write(p)
	}
	h.held = append(h.held, p...)
	return len(p), nil
}

// What arrives together with the client's Finished is not lost, wherever the
// first bytes of the next record end.
func TestLeftover(t *testing.T) {
	a := newAuthority(t, meshTD)
	data := strings.Repeat("early ", 100)
	for _, cut := range []int{0, 1, 4, 5, 6, 100, 10000} {
		cc, sc := sockets(t)
		done := make(chan outcome)
		go func() {
			r, err := Server(context.Background(), sc, a.server())
			done <- outcome{r, err}
		}()
		h := &holding{Conn: cc}
		r, err := Client(context.Background(), h, a.client())
		if err != nil {
			t.Fatal(err)
		}
		client := newStream(t, h, r)
		finished := len(h.held)
		client.send(t, data)
		client.send(t, "second")
		n := min(finished+cut, len(h.held))
		if _, err := cc.Write(h.held[:n]); err != nil {
			t.Fatal(err)
		}
		s := <-done
		if s.err != nil {
			t.Fatal(s.err)
		}
		if len(s.Leftover) != n-finished {
			t.Errorf("%d bytes left over, want %d", len(s.Leftover), n-finished)
		}
		server := newStream(t, sc, s.Result)
		if _, err := cc.Write(h.held[n:]); err != nil {
			t.Fatal(err)
		}
		server.expect(t, data+"second")
	}
}

// trickle gives its reader one byte at a time.
type trickle struct{ net.Conn }

func (c trickle) Read(p []byte) (int, error) { return c.Conn.Read(p[:1]) }

func TestByteByByte(t *testing.T) {
	a := newAuthority(t, meshTD)
	cc, sc := sockets(t)
	c, s := both(t, trickle{cc}, trickle{sc}, a.client(), a.server())
	if c.err != nil || s.err != nil {
		t.Fatalf("client: %v, server: %v", c.err, s.err)
	}
}

// deadlines records what is set.
type deadlines struct {
	net.Conn
	last time.Time
}

func (d *deadlines) SetDeadline(at time.Time) error {
	d.last = at
	return d.Conn.SetDeadline(at)
}

func TestDeadlinesAreCleared(t *testing.T) {
	a := newAuthority(t, meshTD)
	cc, sc := sockets(t)
	cd, sd := &deadlines{Conn: cc}, &deadlines{Conn: sc}
	c, s := both(t, cd, sd, a.client(), a.server())
	if c.err != nil || s.err != nil {
		t.Fatalf("client: %v, server: %v", c.err, s.err)
	}
	if !cd.last.IsZero() || !sd.last.IsZero() {
		t.Errorf("deadlines left: %v, %v", cd.last, sd.last)
	}
}

// The connection is the caller's, whatever happens.
func TestConnectionIsNotClosed(t *testing.T) {
	a := newAuthority(t, meshTD)
	cc, sc := sockets(t)
	bad := a.client()
	bad.Expect = clientID
	c, s := both(t, cc, sc, bad, a.server())
	if c.err == nil || s.err == nil {
		t.Fatalf("client: %v, server: %v", c.err, s.err)
	}
	for _, x := range []net.Conn{cc, sc} {
		if err := x.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := x.Write([]byte("x")); err != nil {
			t.Errorf("closed: %v", err)
		}
	}
}

func TestCancel(t *testing.T) {
	a := newAuthority(t, meshTD)
	cause := errors.New("the pod has gone")
	cc, sc := sockets(t)
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		b := make([]byte, 1)
		sc.Read(b) // the ClientHello is there: the client waits
		cancel(cause)
	}()
	_, err := Client(ctx, cc, a.client())
	if !errors.Is(err, cause) {
		t.Fatalf("got %v, want the cause", err)
	}
}

func TestConfigRefused(t *testing.T) {
	a := newAuthority(t, meshTD)
	cc, _ := sockets(t)
	noExpect := a.client()
	noExpect.Expect = spiffeid.ID{}
	if _, err := Client(context.Background(), cc, noExpect); err == nil {
		t.Error("a client that expects nobody went on")
	}
	if _, err := Server(context.Background(), cc, Config{}); err == nil {
		t.Error("a server without SVID went on")
	}
}

// Neither a secret's line nor what was parsed of it stays.
func TestKeyLog(t *testing.T) {
	var k keyLog
	line := []byte("CLIENT_TRAFFIC_SECRET_0 00112233 a1a2a3\n")
	if n, err := k.Write(line); err != nil || n != len(line) {
		t.Fatal(n, err)
	}
	if !bytes.Equal(line, make([]byte, len(line))) {
		t.Errorf("line left: %q", line)
	}
	got := k.client
	if !bytes.Equal(got, []byte{0xa1, 0xa2, 0xa3}) {
		t.Errorf("secret %x", got)
	}
	k.wipe()
	if !bytes.Equal(got, make([]byte, 3)) {
		t.Error("secret left")
	}
	for _, bad := range []string{"", "x", "CLIENT_TRAFFIC_SECRET_0 00", "CLIENT_TRAFFIC_SECRET_0 00 zz"} {
		if _, err := k.Write([]byte(bad)); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
	if _, err := k.Write([]byte("EXPORTER_SECRET 00 11\n")); err != nil {
		t.Error(err)
	}
}
