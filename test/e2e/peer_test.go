// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// The peers of this file speak HBONE by crypto/tls and x/net/http2 and share no
// code with the tunnel, so that they can be wrong in ways that it never is.

// scaled is a time as a slow machine needs it: one that CULVERT_TEST_SLOWNESS
// says is.
func scaled(d time.Duration) time.Duration {
	const most = 4
	return d * min(most, atOnce()/(50*time.Millisecond))
}

// patience is how long a peer waits for anything.
func patience() time.Duration { return scaled(5 * time.Second) }

// authority is a CA below the lab's root. The root is there once a node has
// been configured.
func (e *env) authority() *testca.CA {
	e.t.Helper()
	ca, err := testca.Below(e.RootDir(), lab.TrustDomain)
	e.must(err)
	return ca
}

// svid has a certificate for a SPIFFE ID.
func (e *env) svid(ca *testca.CA, id string, options ...testca.Option) *identity.SVID {
	e.t.Helper()
	s, err := ca.SVID(spiffeid.RequireFromString(id), options...)
	e.must(err)
	return s
}

// peerTLS is what a good peer says, at either end, changed as the caller likes.
// It checks nobody.
func peerTLS(svid *identity.SVID, change ...func(*tls.Config)) *tls.Config {
	cert := tls.Certificate{PrivateKey: svid.Key, Leaf: svid.Certificates[0]}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	cfg := &tls.Config{
		NextProtos: []string{"h2"}, Certificates: []tls.Certificate{cert},
		InsecureSkipVerify: true, ClientAuth: tls.RequestClientCert,
		// Whatever authorities the server names.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	}
	for _, f := range change {
		f(cfg)
	}
	return cfg
}

// peerSession is a client's session with the daemon, one thing after the other.
type peerSession struct {
	*tls.Conn
	*http2.Framer
	enc   *hpack.Encoder
	block bytes.Buffer // that it writes to
	next  uint32

	announced bool // a GOAWAY, by one that refuses nothing yet
}

// answer is what the daemon says to a request.
type answer struct {
	stream uint32
	status int
	reason string // its culvert-reason
}

// session opens a TCP connection from a pod to another's HBONE port and says
// all that it can before it hears anything: a request with text behind it may
// follow it at once.
func (e *env) session(from *lab.Pod, to netip.Addr, cfg *tls.Config) (*peerSession, error) {
	c, err := e.dial(from, netip.AddrPortFrom(to, hbonePort))
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(patience()))
	s := &peerSession{Conn: tls.Client(c, cfg), next: 1}
	if err := s.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	s.Framer = http2.NewFramer(s.Conn, s.Conn)
	s.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	s.enc = hpack.NewEncoder(&s.block)
	// A refusal may come at any time from here: whoever reads is told.
	_, _ = io.WriteString(s.Conn, http2.ClientPreface)
	_ = s.WriteSettings()
	return s, nil
}

// request sends a header list (name, value, name, value…) and text, and waits for
// the answer.
func (s *peerSession) request(text string, fields ...string) (answer, error) {
	s.block.Reset()
	for i := 0; i+1 < len(fields); i += 2 {
		if err := s.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			return answer{}, err
		}
	}
	a := answer{stream: s.next}
	s.next += 2
	// An error of a write is one of a later read too, and that one may bring an
	// alert.
	_ = s.WriteHeaders(http2.HeadersFrameParam{StreamID: a.stream, BlockFragment: s.block.Bytes(), EndHeaders: true})
	if text != "" {
		_ = s.WriteData(a.stream, false, []byte(text))
	}
	f, err := s.frame(a.stream)
	if err != nil {
		return a, err
	}
	h, ok := f.(*http2.MetaHeadersFrame)
	if !ok {
		return a, fmt.Errorf("answered by %v", f.Header())
	}
	if a.status, err = strconv.Atoi(h.PseudoValue("status")); err != nil {
		return a, err
	}
	for _, f := range h.RegularFields() {
		if f.Name == "culvert-reason" {
			a.reason = f.Value
		}
	}
	return a, nil
}

// connect is a request as it should be.
func (s *peerSession) connect(text string, authority netip.AddrPort, more ...string) (answer, error) {
	return s.request(text, append([]string{":method", "CONNECT", ":authority", authority.String()}, more...)...)
}

// frame reads the next frame of a stream that says something.
func (s *peerSession) frame(stream uint32) (http2.Frame, error) {
	for {
		f, err := s.ReadFrame()
		if err != nil {
			return nil, err
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if f.IsAck() {
				continue
			}
			if n, ok := f.Value(http2.SettingHeaderTableSize); ok {
				s.enc.SetMaxDynamicTableSize(n)
			}
			_ = s.WriteSettingsAck()
		case *http2.PingFrame:
			if !f.IsAck() {
				_ = s.WritePing(true, f.Data)
			}
		case *http2.GoAwayFrame:
			if f.LastStreamID == 1<<31-1 && f.ErrCode == http2.ErrCodeNo { // another is to come
				s.announced = true
				continue
			}
			return nil, fmt.Errorf("GOAWAY %v %q", f.ErrCode, f.DebugData())
		case *http2.WindowUpdateFrame:
		default:
			if f.Header().StreamID == stream {
				return f, nil
			}
		}
	}
}

// expect reads text from a stream.
func (s *peerSession) expect(stream uint32, text string) error {
	var got []byte
	for len(got) < len(text) {
		f, err := s.frame(stream)
		if err != nil {
			return err
		}
		d, ok := f.(*http2.DataFrame)
		if !ok {
			return fmt.Errorf("got %v, want data", f.Header())
		}
		got = append(got, d.Data()...)
	}
	if string(got) != text {
		return fmt.Errorf("got %q, want %q", got, text)
	}
	return nil
}

// carry asks for an application behind the daemon's pod and wants the marker back
// from it. The stream stays open.
func (s *peerSession) carry(to netip.AddrPort, more ...string) (stream uint32, err error) {
	a, err := s.connect(marker, to, more...)
	switch {
	case err != nil:
		return 0, err
	case a.status != 200:
		return 0, fmt.Errorf("status %d (%s)", a.status, a.reason)
	}
	return a.stream, s.expect(a.stream, marker)
}

// ask is carry on a session of its own: what a peer that is let in gets.
func (e *env) ask(from *lab.Pod, cfg *tls.Config, to netip.AddrPort) error {
	s, err := e.session(from, to.Addr(), cfg)
	if err != nil {
		return err
	}
	defer s.NetConn().Close()
	_, err = s.carry(to)
	return err
}

// peerServer is a pod that is not enrolled and listens on the HBONE port, with a
// new config for each connection.
type peerServer struct {
	*lab.App
	next chan func(net.Conn) heard
	told chan heard
}

// heard is what a server was told by one client.
type heard struct {
	err  error  // of the handshake, or what came instead of a request
	data []byte // what the client's application said
}

func (e *env) peerServer(p *lab.Pod) *peerServer {
	e.t.Helper()
	s := &peerServer{next: make(chan func(net.Conn) heard, 1), told: make(chan heard, 16)}
	app, err := p.Serve(hbonePort, func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Now().Add(patience()))
		select {
		case f := <-s.next:
			s.told <- f(c)
		default:
			s.told <- heard{err: errors.New("nobody was expected")}
		}
	})
	e.must(err)
	s.App = app
	return s
}

// serve has the next connection served as a good server does: CONNECT is
// answered, and what comes is sent back. hang up ends the session in good order.
func (s *peerServer) serve(cfg *tls.Config) (hangUp func()) {
	end := make(chan struct{})
	s.next <- func(raw net.Conn) heard {
		c := tls.Server(raw, cfg)
		if err := c.Handshake(); err != nil {
			return heard{err: err}
		}
		over := make(chan struct{})
		defer close(over)
		go func() {
			select {
			case <-end:
				_ = c.CloseWrite() // the client says goodbye too, and closes
			case <-over:
			}
		}()
		first := &firstRead{Conn: c}
		var got echoed
		//lint:ignore SA1019 net/http takes a listener, not a connection whose first read is looked at.
		(&http2.Server{}).ServeConn(first, &http2.ServeConnOpts{Handler: &got})
		return heard{err: first.err, data: got.bytes()}
	}
	return func() { close(end) }
}

// echoed answers CONNECT, sends back what it gets, and keeps it.
type echoed struct {
	mu  sync.Mutex // guards all
	all []byte
}

func (e *echoed) bytes() []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.all
}

func (e *echoed) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	b := make([]byte, 4096)
	for {
		n, err := r.Body.Read(b)
		e.mu.Lock()
		e.all = append(e.all, b[:n]...)
		e.mu.Unlock()
		_, _ = w.Write(b[:n])
		w.(http.Flusher).Flush()
		if err != nil {
			return
		}
	}
}

// silent has the next connection accepted and not answered.
func (s *peerServer) silent() {
	s.next <- func(c net.Conn) heard {
		data, err := io.ReadAll(c)
		return heard{err: err, data: data}
	}
}

// firstRead keeps the error of a connection's first read.
type firstRead struct {
	net.Conn
	read bool
	err  error
}

func (c *firstRead) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if !c.read {
		c.read, c.err = true, err
	}
	return n, err
}

// alert is the alert that a peer of the daemon heard, as crypto/tls calls it.
func alert(err error) string {
	if err == nil {
		return ""
	}
	_, name, ok := strings.Cut(err.Error(), "remote error: tls: ")
	if !ok {
		return ""
	}
	return name
}
