// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// transcript is a peer that has said all that it will, and what it is told.
type transcript struct {
	in  *bytes.Reader
	out bytes.Buffer
}

func (c *transcript) Read(p []byte) (int, error)       { return c.in.Read(p) }
func (c *transcript) Write(p []byte) (int, error)      { return c.out.Write(p) }
func (c *transcript) Close() error                     { return nil }
func (c *transcript) LocalAddr() net.Addr              { return nil }
func (c *transcript) RemoteAddr() net.Addr             { return nil }
func (c *transcript) SetDeadline(time.Time) error      { return nil }
func (c *transcript) SetReadDeadline(time.Time) error  { return nil }
func (c *transcript) SetWriteDeadline(time.Time) error { return nil }

// shape is the types of the records of a flight, and the alerts that can be read.
// What else is in them is random.
func shape(b []byte) string {
	out := ""
	for len(b) >= 5 {
		n := min(5+(int(b[3])<<8|int(b[4])), len(b))
		out += fmt.Sprint(b[0], " ")
		if b[0] == typeAlert && n == 7 {
			out += fmt.Sprint("alert ", b[6], " ")
		}
		b = b[n:]
	}
	return out
}

// FuzzServer: whatever a peer says first, our server answers as crypto/tls does by
// itself, and lets nobody in.
func FuzzServer(f *testing.F) {
	a := newAuthority(f, spiffeid.RequireTrustDomainFromString("mesh.example"))
	cfg := a.server()
	for _, change := range []func(*tls.Config){
		func(*tls.Config) {},
		func(c *tls.Config) { c.NextProtos = nil },
		func(c *tls.Config) { c.MaxVersion, c.MinVersion = tls.VersionTLS12, tls.VersionTLS12 },
		func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} },
	} {
		c := &transcript{in: bytes.NewReader(nil)}
		hello := &tls.Config{NextProtos: []string{"h2"}, InsecureSkipVerify: true}
		change(hello)
		_ = tls.Client(c, hello).Handshake()
		f.Add(c.out.Bytes())
		f.Add(append(bytes.Clone(c.out.Bytes()), 20, 3, 3, 0, 1, 1, 23, 3, 3, 0, 2, 0, 0))
	}
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{21, 3, 1, 0, 2, 2, 40})
	f.Fuzz(func(t *testing.T, in []byte) {
		ours := &transcript{in: bytes.NewReader(in)}
		if r, err := Server(t.Context(), ours, cfg); err == nil {
			t.Fatalf("somebody was let in: %+v", r)
		}
		theirs := &transcript{in: bytes.NewReader(in)}
		side := &side{cfg: cfg, conn: conn{Conn: theirs}}
		err := tls.Server(theirs, side.config()).Handshake()
		if err == nil {
			t.Fatal("crypto/tls let somebody in")
		}
		if got, want := shape(ours.out.Bytes()), shape(theirs.out.Bytes()); got != want && len(in) <= maxBytes {
			t.Fatalf("answered with %q, crypto/tls with %q (%v)", got, want, err)
		}
	})
}
