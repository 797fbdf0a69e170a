// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// recordConn is a plain implementation of the record layer's use: what is
// written is sealed, what is read was opened.
type recordConn struct {
	c     net.Conn
	l     *record.Layer
	in    []byte // ciphertext
	plain []byte
	buf   []byte
}

func (c *recordConn) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), record.MaxPlaintext)
		slot := make([]byte, record.SlotLen)
		copy(slot[record.HeaderLen:], rest[:n])
		if _, err := c.c.Write(slot[:c.l.Seal(slot, n)]); err != nil {
			return 0, err
		}
		rest = rest[n:]
	}
	return len(p), nil
}

func (c *recordConn) Read(p []byte) (int, error) {
	for len(c.plain) == 0 {
		data, n, err := c.l.Open(c.in)
		if err != nil {
			return 0, err
		}
		c.in = c.in[n:]
		if n > 0 {
			c.plain = data
			continue
		}
		if c.buf == nil {
			c.buf = make([]byte, record.SlotLen)
		}
		k, err := c.c.Read(c.buf)
		if err != nil {
			return 0, err
		}
		c.in = append(bytes.Clone(c.in), c.buf[:k]...)
	}
	n := copy(p, c.plain)
	c.plain = c.plain[n:]
	return n, nil
}

// peer is the other end of a trunk, played by the test frame by frame.
type peer struct {
	t    testing.TB
	conn *net.TCPConn
	rc   *recordConn
	fr   *http2.Framer
	enc  *hpack.Encoder
	hb   bytes.Buffer
}

// facing gives the rig one trunk, a client's or a server's, and the test the
// other end.
func (r *rig) facing(client bool) *peer {
	r.t.Helper()
	return r.facingOn(r.worker(), client)
}

func (r *rig) facingOn(w *relay.Worker, client bool) *peer {
	r.t.Helper()
	a, b := pair(r.t)
	ours, theirs := keys()
	if !client {
		ours, theirs = theirs, ours
	}
	layer, err := record.New(theirs)
	if err != nil {
		r.t.Fatal(err)
	}
	p := &peer{t: r.t, conn: netConn(r.t, b)}
	r.t.Cleanup(func() { p.conn.Close() })
	_ = p.conn.SetDeadline(time.Now().Add(patience))
	p.rc = &recordConn{c: p.conn, l: layer}
	p.fr = http2.NewFramer(p.rc, p.rc)
	p.fr.AllowIllegalWrites = true
	p.fr.SetMaxReadFrameSize(1 << 20)
	p.enc = hpack.NewEncoder(&p.hb)
	p.enc.SetMaxDynamicTableSizeLimit(0)
	if client {
		r.client = w
		r.trunk = r.newTrunk(w, "client", a, ours, r.cfg.client)
		preface := make([]byte, len(http2.ClientPreface))
		if _, err := io.ReadFull(p.rc, preface); err != nil || string(preface) != http2.ClientPreface {
			r.t.Fatalf("preface %q, %v", preface, err)
		}
	} else {
		r.server = w
		r.far = r.newTrunk(w, "server", a, ours, r.cfg.server)
		_, err := p.rc.Write([]byte(http2.ClientPreface))
		p.must(err)
	}
	return p
}

func (p *peer) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// settle exchanges SETTINGS.
func (p *peer) settle(s ...http2.Setting) {
	p.t.Helper()
	p.must(p.fr.WriteSettings(s...))
	for {
		f := p.frame()
		if s, ok := f.(*http2.SettingsFrame); ok {
			if s.IsAck() {
				return
			}
			p.must(p.fr.WriteSettingsAck())
		}
	}
}

func (p *peer) headers(id uint32, pairs ...string) {
	p.t.Helper()
	p.hb.Reset()
	for i := 0; i < len(pairs); i += 2 {
		p.must(p.enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]}))
	}
	p.must(p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.hb.Bytes(), EndHeaders: true}))
}

func (p *peer) frame() http2.Frame {
	p.t.Helper()
	f, err := p.fr.ReadFrame()
	p.must(err)
	return f
}

// until reads frames up to one of type F, which is returned.
func until[F http2.Frame](p *peer) F {
	p.t.Helper()
	for {
		if f, ok := p.frame().(F); ok {
			return f
		}
	}
}
