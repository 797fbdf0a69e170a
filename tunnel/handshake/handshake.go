// SPDX-License-Identifier: Apache-2.0

// Package handshake makes the TLS 1.3 handshake of a tunnel connection by
// crypto/tls and hands over what is left of it: the traffic secrets, who the
// peer is, and the bytes read behind the last record. From there tunnel/record
// goes on; the tls.Conn is dropped and never closed.
//
// Both sides present X.509 SVIDs, ALPN is h2, there is neither SNI nor
// resumption. The peer's certificate is checked by identity.Verifier and by
// nothing else.
//
// It closes no connection: the caller owns it, also after an error. When the
// error comes back the alert that tells the peer why has been written, so the
// caller should not discard unsent bytes (SO_LINGER with 0 seconds) before it
// closes.
//
// A client's handshake ends before the server has looked at the client's
// certificate (TLS 1.3): a refusal arrives as the first record after it, a
// *record.PeerAlert, which FromAlert turns into a failure.
//
// crypto/tls lets nobody configure TLS 1.3's cipher suites. Where the CPU has
// AES instructions it offers AES-128-GCM first, and as a server takes it from any
// client whose first choice is an AES suite; elsewhere it prefers
// ChaCha20-Poly1305. That is the order we would choose.
package handshake

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/tunnel/record"
)

const (
	// DefaultTimeout of Config, the one of Istio's ztunnel.
	DefaultTimeout = 10 * time.Second

	// maxBytes is what a peer may send until the handshake has ended. A chain
	// of three ECDSA certificates and a hybrid key share are below 5 KiB.
	maxBytes = 64 << 10

	protocol = "h2" // ALPN
)

// Config is one side of one handshake.
type Config struct {
	SVID     *identity.SVID    // what we present
	Verifier identity.Verifier // the peer check
	Expect   spiffeid.ID       // whom a client expects, must be set; zero at a server: anyone whom Verifier accepts
	Timeout  time.Duration     // for all of it; 0: DefaultTimeout
	Turn     sync.Locker       // held while this side computes, and not while it waits for the peer; nil: nothing is held
}

// Result is what a handshake leaves behind.
type Result struct {
	Secrets     record.Secrets // for record.New, which takes them over
	Peer        identity.Peer
	Leftover    []byte // read behind the last record: the first input of the record layer
	CipherSuite uint16
	Group       tls.CurveID // of the key exchange
	Duration    time.Duration
}

// Client makes the client's side. It blocks until the handshake has ended, ctx
// is cancelled, or the timeout is over. The error is an *identity.Failure
// whenever one of its reasons applies; what remains is a cancelled ctx and a
// Config that cannot be used. c's deadlines are used, and cleared on success.
func Client(ctx context.Context, c net.Conn, cfg Config) (*Result, error) {
	if cfg.Expect.IsZero() {
		return nil, errors.New("shake hands: no identity of the server is expected")
	}
	return shake(ctx, c, cfg, true)
}

// Server makes the server's side, as Client does.
func Server(ctx context.Context, c net.Conn, cfg Config) (*Result, error) {
	return shake(ctx, c, cfg, false)
}

func shake(ctx context.Context, c net.Conn, cfg Config, client bool) (*Result, error) {
	if cfg.SVID == nil || len(cfg.SVID.Certificates) == 0 || cfg.SVID.Key == nil {
		return nil, errors.New("shake hands: no SVID to present")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	s := &side{cfg: cfg, client: client, conn: conn{Conn: c, turn: cfg.Turn}}
	defer s.keys.wipe()

	start := time.Now()
	if err := c.SetDeadline(start.Add(cfg.Timeout)); err != nil {
		return nil, fmt.Errorf("set handshake deadline: %w", err)
	}
	if cfg.Turn != nil { // it is waited for in the handshake's own time
		cfg.Turn.Lock()
		defer cfg.Turn.Unlock()
	}
	// HandshakeContext would close c when ctx ends, and c is not ours.
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.SetDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	err := s.run()
	if !stop() {
		<-interrupted
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, fmt.Errorf("shake hands: %w", context.Cause(ctx))
		}
		return nil, &identity.Failure{Reason: identity.ReasonTimeout, Detail: "deadline of the caller", Err: context.Cause(ctx)}
	}
	if err != nil {
		return nil, s.failure(err)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("clear handshake deadline: %w", err)
	}
	secrets := s.secrets()
	s.keys.client, s.keys.server = nil, nil // they have gone to the caller
	return &Result{
		Secrets:     secrets,
		Peer:        s.peer,
		Leftover:    s.conn.leftover(),
		CipherSuite: s.suite,
		Group:       s.group,
		Duration:    time.Since(start),
	}, nil
}

// side is one handshake on its way.
type side struct {
	cfg    Config
	client bool
	conn   conn
	keys   keyLog

	asked    bool // the server asked for our certificate
	verified bool // the peer check was passed
	peer     identity.Peer
	refused  *identity.Failure // what the peer check said
	suite    uint16
	group    tls.CurveID
}

// run returns when the handshake has ended; where the peer check has refused the
// peer it sends the alert.
func (s *side) run() error {
	var tc *tls.Conn
	if s.client {
		tc = tls.Client(&s.conn, s.config())
	} else {
		tc = tls.Server(&s.conn, s.config())
	}
	err := tc.Handshake()
	if err == nil {
		err = s.finish(tc)
	}
	if s.refused != nil {
		s.sendAlert(err == nil)
		return s.refused
	}
	return err
}

// finish looks at what only the end of a handshake shows.
func (s *side) finish(tc *tls.Conn) error {
	state := tc.ConnectionState()
	s.group = state.CurveID
	switch {
	case !s.verified || state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != protocol:
		return errors.New("handshake ended without the peer check") // crypto/tls does not do that
	case s.keys.client == nil || s.keys.server == nil || !s.conn.atBoundary():
		return errors.New("handshake ended without its secrets")
	case s.client && !s.asked:
		s.refused = &identity.Failure{Reason: identity.ReasonTLSProtocol, Detail: "server asked for no certificate"}
	}
	return nil
}

func (s *side) config() *tls.Config {
	cert := tls.Certificate{PrivateKey: s.cfg.SVID.Key, Leaf: s.cfg.SVID.Certificates[0]}
	for _, c := range s.cfg.SVID.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		MaxVersion:             tls.VersionTLS13,
		NextProtos:             []string{protocol},
		SessionTicketsDisabled: true,
		KeyLogWriter:           &s.keys,
		// VerifyConnection is the whole check of the peer: SPIFFE has no host
		// names to verify, and each trust domain has its own roots. A handshake
		// without it does not pass finish.
		InsecureSkipVerify: true,
		VerifyConnection:   s.verify,
		// A server asks here and insists in verify, which can say why.
		ClientAuth:   tls.RequestClientCert,
		Certificates: []tls.Certificate{cert},
		// Whatever authorities the server names: it is for the server to refuse.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			s.asked = true
			return &cert, nil
		},
	}
}

// verify is the peer check. It runs before the peer has proven that it has the
// certificate's key: nothing that it learns is used before the handshake's end.
func (s *side) verify(state tls.ConnectionState) error {
	s.suite = state.CipherSuite
	s.refused = s.check(state)
	if s.refused == nil {
		s.verified = true
		return nil
	}
	// crypto/tls would say bad_certificate for each reason: sendAlert says it
	// better.
	s.conn.mute = true
	return s.refused
}

func (s *side) check(state tls.ConnectionState) *identity.Failure {
	if state.NegotiatedProtocol != protocol {
		return &identity.Failure{Reason: identity.ReasonTLSProtocol, Detail: "peer does not speak ALPN h2", Err: errNoALPN}
	}
	if len(state.PeerCertificates) == 0 {
		return &identity.Failure{Reason: identity.ReasonNoCertificate, Detail: "peer presented no certificate"}
	}
	peer, failure := s.cfg.Verifier.Verify(state.PeerCertificates, s.cfg.Expect)
	s.peer = peer
	return failure
}

// secrets is the application epoch.
func (s *side) secrets() record.Secrets {
	r := record.Secrets{Suite: s.suite, Client: s.client, Read: s.keys.client, Write: s.keys.server}
	if s.client {
		r.Read, r.Write = r.Write, r.Read
	}
	return r
}

// isTimeout reports whether a deadline of c has passed.
func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}
