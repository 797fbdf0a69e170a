// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/record"
)

// The attacker is this test's own binary in another process, in a pod's network
// namespace. In life it is another machine; here it has what of the processors the
// daemons and the other pair leave (nice, in bench_test.go). The same goes for the
// applications that it asks for.

// environment tells the test's binary to be an attacker, or its applications.
const environment = "CULVERT_HOSTILE"

// order is what an attacker is told.
type order struct {
	Kind       string
	Target     string // the pod's HBONE port
	Listen     string // where a server listens
	App        string // an application that answers
	Deaf       string // one that takes nothing
	Loud       string // one that says all that it can
	Closed     string // nobody listens
	Cert, Key  string // PEM files; of another trust domain for one kind
	Block      string // a prefix, whose addresses it has in turn; empty: its pod's own address
	ForSeconds float64
	Result     string // the file that the result goes to
}

// as is the same order for another kind.
func (o order) as(kind string) order {
	o.Kind = kind
	return o
}

type attacker struct {
	order
	ctx context.Context
	cfg *tls.Config

	block addresses

	connections, sessions, frames, bytes, held atomic.Int64

	mu      sync.Mutex // guards what follows
	answers map[string]int64
	ends    map[string]int64
}

// attack is the main function of the other process.
func attack(text string) int {
	var a attacker
	if err := json.Unmarshal([]byte(text), &a.order); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if f := helpers[a.Kind]; f != nil {
		if err := f(a.order); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	var err error
	if a.block, err = newAddresses(a.Block); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	cert, err := tls.LoadX509KeyPair(a.Cert, a.Key)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	a.answers, a.ends = map[string]int64{}, map[string]int64{}
	a.cfg = &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, time.Duration(a.ForSeconds*float64(time.Second)))
	defer cancel()
	a.ctx = ctx
	k, ok := kinds[a.Kind]
	if !ok {
		fmt.Fprintln(os.Stderr, "unknown kind", a.Kind)
		return 1
	}
	var all sync.WaitGroup
	if k.serve != nil {
		l, err := net.Listen("tcp", a.Listen)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		context.AfterFunc(ctx, func() { l.Close() })
		k.workers, k.run = 4, func(a *attacker) {
			if s := a.accept(l, &cert); s != nil {
				k.serve(s)
			}
		}
	}
	begun := time.Now()
	for range max(1, k.workers) {
		all.Go(func() {
			for ctx.Err() == nil {
				k.run(&a)
			}
		})
	}
	all.Wait()
	seen, err := json.Marshal(result{
		Seconds: time.Since(begun).Seconds(), Connections: a.connections.Load(), Sessions: a.sessions.Load(), Frames: a.frames.Load(), Bytes: a.bytes.Load(),
		Answers: a.answers, Ends: a.ends, Held: a.held.Load(),
	})
	if err == nil {
		err = os.WriteFile(a.Result, seen, 0o600)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (a *attacker) answered(what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answers[what]++
}

// ended notes how a connection ended; what ended with the attack is held.
func (a *attacker) ended(err error) {
	if a.ctx.Err() != nil {
		a.held.Add(1)
		return
	}
	why := "closed"
	switch {
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		why = "reset"
	case errors.Is(err, syscall.ECONNREFUSED):
		why = "refused"
	case strings.Contains(err.Error(), "tls: "):
		_, why, _ = strings.Cut(err.Error(), "tls: ")
	default:
		why = err.Error()
		if i := strings.LastIndex(why, ": "); i >= 0 {
			why = why[i+2:]
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ends[why]++
}

// dial is a TCP connection to the target; nil: there is none.
func (a *attacker) dial() net.Conn {
	d := net.Dialer{Timeout: 2 * time.Second}
	if own := a.block.next(); own.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(own, 0))
	}
	c, err := d.DialContext(a.ctx, "tcp", a.Target)
	if err != nil {
		if a.ctx.Err() == nil {
			a.ended(err)
		}
		return nil
	}
	a.connections.Add(1)
	context.AfterFunc(a.ctx, func() { c.Close() })
	return c
}

// session is a good session, up to the client's first SETTINGS.
type session struct {
	a       *attacker
	raw     net.Conn
	conn    *tls.Conn
	layer   *record.Layer // for records that crypto/tls does not write; then conn is only read
	slot    []byte
	enc     *hpack.Encoder
	block   strings.Builder
	out     []byte
	id      uint32 // of the next stream
	over    chan struct{}
	settled chan struct{} // the server's SETTINGS came
	read    bool
	goaway  string
	asked   chan uint32  // a server's: the stream of the first request
	heard   atomic.Int64 // answers to what paced sends
}

// secrets keeps the traffic secrets of a handshake.
type secrets struct{ client, server []byte }

func (s *secrets) Write(line []byte) (int, error) {
	if f := strings.Fields(string(line)); len(f) == 3 && f[0] == "CLIENT_TRAFFIC_SECRET_0" {
		s.client, _ = hex.DecodeString(f[2])
	} else if len(f) == 3 && f[0] == "SERVER_TRAFFIC_SECRET_0" {
		s.server, _ = hex.DecodeString(f[2])
	}
	return len(line), nil
}

// open shakes hands and begins HTTP/2. nil: it did not come about. deaf: nothing
// is read. settings are pairs of numbers.
func (a *attacker) open(deaf bool, settings ...http2.Setting) *session {
	c := a.dial()
	if c == nil {
		return nil
	}
	cfg := a.cfg.Clone()
	var keys secrets
	cfg.KeyLogWriter = &keys
	s := &session{a: a, raw: c, conn: tls.Client(c, cfg), id: 1, over: make(chan struct{}), settled: make(chan struct{}), slot: make([]byte, record.SlotLen)}
	if err := s.conn.HandshakeContext(a.ctx); err != nil {
		a.ended(err)
		c.Close()
		return nil
	}
	a.sessions.Add(1)
	var err error
	s.layer, err = record.New(record.Secrets{Suite: s.conn.ConnectionState().CipherSuite, Client: true, Write: keys.client, Read: append([]byte(nil), keys.client...)})
	if err != nil {
		panic(err)
	}
	s.enc = hpack.NewEncoder(&s.block)
	s.enc.SetMaxDynamicTableSizeLimit(0)
	s.add([]byte(http2.ClientPreface))
	s.frame(http2.FrameSettings, 0, 0, settingsPayload(settings))
	if !s.flush() {
		s.close()
		return nil
	}
	if deaf {
		close(s.over)
		close(s.settled)
		return s
	}
	s.read = true
	go s.listen()
	select {
	case <-s.settled:
	case <-s.over:
	}
	return s
}

// accept takes a session as a server, up to the client's first request.
func (a *attacker) accept(l net.Listener, cert *tls.Certificate) *session {
	c, err := l.Accept()
	if err != nil {
		<-a.ctx.Done()
		return nil
	}
	a.connections.Add(1)
	context.AfterFunc(a.ctx, func() { c.Close() })
	var keys secrets
	s := &session{a: a, raw: c, id: 2, over: make(chan struct{}), settled: make(chan struct{}), asked: make(chan uint32, 1), slot: make([]byte, record.SlotLen)}
	s.conn = tls.Server(c, &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{*cert},
		ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true, KeyLogWriter: &keys,
	})
	if err := s.conn.HandshakeContext(a.ctx); err != nil {
		a.ended(err)
		c.Close()
		return nil
	}
	a.sessions.Add(1)
	s.layer, err = record.New(record.Secrets{Suite: s.conn.ConnectionState().CipherSuite, Write: keys.server, Read: append([]byte(nil), keys.server...)})
	if err != nil {
		panic(err)
	}
	s.enc = hpack.NewEncoder(&s.block)
	s.enc.SetMaxDynamicTableSizeLimit(0)
	s.frame(http2.FrameSettings, 0, 0, nil)
	if !s.flush() {
		c.Close()
		return nil
	}
	s.read = true
	go s.listen()
	select {
	case s.id = <-s.asked:
		return s
	case <-s.over:
	case <-a.ctx.Done():
	}
	s.close()
	return nil
}

func settingsPayload(settings []http2.Setting) []byte {
	var p []byte
	for _, x := range settings {
		p = append(p, byte(x.ID>>8), byte(x.ID), byte(x.Val>>24), byte(x.Val>>16), byte(x.Val>>8), byte(x.Val))
	}
	return p
}

// listen counts what the server says.
func (s *session) listen() {
	defer close(s.over)
	if s.asked != nil {
		if _, err := io.ReadFull(s.conn, make([]byte, len(http2.ClientPreface))); err != nil {
			s.a.ended(err)
			return
		}
	}
	fr := http2.NewFramer(nil, s.conn)
	fr.SetMaxReadFrameSize(1 << 20)
	fr.SetReuseFrames()
	dec := hpack.NewDecoder(4096, nil)
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			if s.goaway == "" {
				s.a.ended(err)
			} else if s.a.ctx.Err() == nil {
				s.a.mu.Lock()
				s.a.ends[s.goaway]++
				s.a.mu.Unlock()
			} else {
				s.a.held.Add(1)
			}
			return
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				select {
				case <-s.settled:
				default:
					close(s.settled)
				}
			} else {
				s.a.answered("SETTINGS ack")
			}
		case *http2.GoAwayFrame:
			s.goaway = f.ErrCode.String()
		case *http2.RSTStreamFrame:
			s.a.answered("RST_STREAM " + f.ErrCode.String())
		case *http2.HeadersFrame:
			if s.asked != nil {
				select {
				case s.asked <- f.StreamID:
				default:
				}
				continue
			}
			if fields, err := dec.DecodeFull(f.HeaderBlockFragment()); err == nil && len(fields) > 0 {
				s.a.answered("status " + fields[0].Value)
				s.heard.Add(1)
			}
		case *http2.PingFrame:
			s.a.answered("PING")
			s.heard.Add(1)
		case *http2.DataFrame:
			s.a.answered("DATA")
		}
	}
}

// add lays bytes down to be sent.
func (s *session) add(p []byte) { s.out = append(s.out, p...) }

// frame lays a frame down.
func (s *session) frame(t http2.FrameType, flags http2.Flags, id uint32, payload []byte) {
	n := len(payload)
	s.out = append(s.out, byte(n>>16), byte(n>>8), byte(n), byte(t), byte(flags), byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
	s.out = append(s.out, payload...)
	s.a.frames.Add(1)
}

// headers is an encoded header list.
func (s *session) headers(pairs ...string) []byte {
	s.block.Reset()
	for i := 0; i < len(pairs); i += 2 {
		_ = s.enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return []byte(s.block.String())
}

// connect lays a CONNECT down, and returns its stream.
func (s *session) connect(authority string) uint32 {
	id := s.id
	s.id += 2
	s.frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, id, s.headers(":method", "CONNECT", ":authority", authority))
	return id
}

// batch is how many bytes are sealed at once.
const batch = 64 << 10

// flush seals and sends what was laid down; false: the session is over.
func (s *session) flush() bool {
	var wire []byte
	for p := s.out; len(p) > 0; {
		n := copy(s.slot[record.HeaderLen:record.HeaderLen+record.MaxPlaintext], p)
		p = p[n:]
		wire = append(wire, s.slot[:s.layer.Seal(s.slot, n)]...)
	}
	s.out = s.out[:0]
	return s.write(wire)
}

// write sends ciphertext.
func (s *session) write(wire []byte) bool {
	n, err := s.raw.Write(wire)
	s.a.bytes.Add(int64(n))
	return err == nil && s.a.ctx.Err() == nil
}

// flood lays down with f and sends, until the session is over.
func (s *session) flood(f func()) {
	defer s.close()
	for {
		for len(s.out) < batch {
			f()
		}
		if !s.flush() {
			return
		}
	}
}

// hold keeps the session until it is over.
func (s *session) hold() {
	defer s.close()
	select {
	case <-s.over:
	case <-s.a.ctx.Done():
	}
}

// close waits for what the server had to say, and hangs up.
func (s *session) close() {
	if s.read {
		select {
		case <-s.over:
		case <-s.a.ctx.Done():
		case <-time.After(2 * time.Second):
		}
	}
	s.raw.Close()
	if s.read {
		<-s.over
	}
}
