// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"io"
	"net"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/internal/testca"
)

// What is said of a path is what a real server has chosen.
func TestFindHello(t *testing.T) {
	ca, err := testca.New("example.org")
	if err != nil {
		t.Fatal(err)
	}
	svid, err := ca.SVID(spiffeid.RequireFromString("spiffe://example.org/server"))
	if err != nil {
		t.Fatal(err)
	}
	server := &tls.Config{Certificates: []tls.Certificate{{PrivateKey: svid.Key, Certificate: [][]byte{svid.Certificates[0].Raw}}}}
	for _, group := range []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256} {
		seen := handshake(t, server, &tls.Config{CurvePreferences: []tls.CurveID{group}})
		// Something is before it, as in a frame, and something after it.
		frames := append(append([]byte("\x16\x03\x03 no record"), seen...), 1, 2, 3)
		if got, ok := findHello(frames); !ok || got.group != group || tls.CipherSuiteName(got.suite)[:4] != "TLS_" {
			t.Errorf("%v: found %v, %v", group, got, ok)
		}
		for n := range seen[:60] {
			if got, ok := findHello(seen[:n]); ok {
				t.Errorf("%d bytes of a hello were read as %v", n, got)
			}
		}
	}
	old := handshake(t, server, &tls.Config{MaxVersion: tls.VersionTLS12})
	if got, ok := findHello(old); ok {
		t.Errorf("a hello of TLS 1.2 was read as %v", got)
	}
}

// handshake returns what a server has said in one.
func handshake(t *testing.T, server, client *tls.Config) []byte {
	t.Helper()
	a, b := net.Pipe()
	rec := &recorder{Conn: a}
	done := make(chan error, 1)
	go func() {
		c := tls.Server(rec, server)
		_, err := c.Write([]byte("x"))
		done <- err
	}()
	client.InsecureSkipVerify = true // it is the hello that is looked at
	if _, err := io.ReadFull(tls.Client(b, client), make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.Close()
	b.Close()
	return rec.wrote
}

type recorder struct {
	net.Conn
	wrote []byte
}

func (r *recorder) Write(b []byte) (int, error) {
	r.wrote = append(r.wrote, b...)
	return r.Conn.Write(b)
}
