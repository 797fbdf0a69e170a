// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// peerMesh is a mesh of which one workload, impostor, is a server of this
// file's: it sees each frame of our client and answers as a test says.
type peerMesh struct {
	*env
	ca       *testca.CA
	client   *lab.Pod
	impostor *lab.Pod
	daemons  []*lab.Daemon
	sessions chan *framed
	settings []http2.Setting             // that it sends
	present  *atomic.Pointer[tls.Config] // to the next client
}

func newPeerMesh(t *testing.T, cfg lab.DaemonConfig, settings ...http2.Setting) *peerMesh {
	t.Helper()
	e := setup(t)
	e.must(e.Nodes[0].Configure(lab.DaemonConfig{}))
	m := &peerMesh{
		env: e, ca: e.authority(), client: e.Pod(1, 1), impostor: e.Pod(2, 3),
		sessions: make(chan *framed, 64), settings: settings,
	}
	m.present = new(atomic.Pointer[tls.Config])
	m.present.Store(peerTLS(e.svid(m.ca, m.impostor.Identity())))
	_, err := m.impostor.Serve(hbonePort, func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Now().Add(4 * patience()))
		seen := &records{Conn: c}
		f := &framed{conn: tls.Server(seen, m.present.Load()), raw: c, records: seen, frames: make(chan frame, 4096)}
		if f.conn.Handshake() != nil {
			return
		}
		f.serve(m.settings, m.sessions)
	})
	e.must(err)
	cfg.Workloads = append(e.enrolled(), m.impostor.Workload())
	m.daemons = e.start(cfg)
	return m
}

func (m *peerMesh) in(t *testing.T) *peerMesh {
	sub := *m
	sub.env = m.env.in(t)
	return &sub
}

// session is the next session that a client opens.
func (m *peerMesh) session() *framed {
	m.t.Helper()
	select {
	case f := <-m.sessions:
		m.t.Cleanup(func() { f.raw.Close() })
		f.t = m.t
		return f
	case <-time.After(patience()):
		m.t.Fatal("no session was opened")
		return nil
	}
}

// none wants no further session to have been opened.
func (m *peerMesh) none() {
	m.t.Helper()
	select {
	case <-m.sessions:
		m.t.Error("another session was opened")
	default:
	}
}

// frame is a frame that was read, with copies of what is in it.
type frame struct {
	http2.FrameHeader
	data   []byte
	fields []hpack.HeaderField
	code   http2.ErrCode
	grows  int // bytes by which a window does
}

// records counts the TLS records that are read, by the length that their headers
// say.
type records struct {
	net.Conn
	mu      sync.Mutex // guards what follows
	lengths map[int]int
	header  []byte
	skip    int
}

func (r *records) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	for b := p[:n]; len(b) > 0; {
		if r.skip > 0 {
			k := min(r.skip, len(b))
			r.skip -= k
			b = b[k:]
			continue
		}
		r.header = append(r.header, b[0])
		b = b[1:]
		if len(r.header) == 5 {
			r.skip = int(r.header[3])<<8 | int(r.header[4])
			if r.lengths == nil {
				r.lengths = map[int]int{}
			}
			r.lengths[r.skip]++
			r.header = r.header[:0]
		}
	}
	return n, err
}

// of is how many records had a length.
func (r *records) of(length int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lengths[length]
}

// framed is the server's end of a session, frame by frame. SETTINGS are
// acknowledged, PING is answered unless deaf is set, windows are kept open.
type framed struct {
	t       *testing.T
	conn    *tls.Conn
	raw     *net.TCPConn
	records *records
	frames  chan frame // closed at the end

	given atomic.Int64 // bytes by which the connection's window has grown

	mu   sync.Mutex // guards all
	fr   *http2.Framer
	enc  *hpack.Encoder
	buf  bytes.Buffer
	deaf bool
}

func (f *framed) serve(settings []http2.Setting, ready chan<- *framed) {
	defer close(f.frames)
	if _, err := io.ReadFull(f.conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	f.fr = http2.NewFramer(f.conn, f.conn)
	f.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.fr.SetMaxReadFrameSize(1 << 20)
	f.enc = hpack.NewEncoder(&f.buf)
	f.do(func() error { return f.fr.WriteSettings(settings...) })
	ready <- f
	for {
		x, err := f.fr.ReadFrame()
		if err != nil {
			return
		}
		out := frame{FrameHeader: x.Header()}
		switch x := x.(type) {
		case *http2.SettingsFrame:
			if x.IsAck() {
				continue
			}
			if n, ok := x.Value(http2.SettingHeaderTableSize); ok {
				f.do(func() error { f.enc.SetMaxDynamicTableSize(n); return nil })
			}
			f.do(func() error { return f.fr.WriteSettingsAck() })
			continue
		case *http2.PingFrame:
			f.do(func() error {
				if f.deaf || x.IsAck() {
					return nil
				}
				return f.fr.WritePing(true, x.Data)
			})
		case *http2.DataFrame:
			out.data = bytes.Clone(x.Data())
			if n := x.Length; n > 0 {
				f.do(func() error { return f.fr.WriteWindowUpdate(0, n) })
				if !x.StreamEnded() {
					f.do(func() error { return f.fr.WriteWindowUpdate(x.StreamID, n) })
				}
			}
		case *http2.MetaHeadersFrame:
			out.fields = append(out.fields, x.Fields...)
		case *http2.WindowUpdateFrame:
			out.grows = int(x.Increment)
			if x.StreamID == 0 {
				f.given.Add(int64(x.Increment))
			}
		case *http2.RSTStreamFrame:
			out.code = x.ErrCode
		case *http2.GoAwayFrame:
			out.code = x.ErrCode
		}
		f.frames <- out
	}
}

// do writes.
func (f *framed) do(write func() error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_ = write() // an error is one of the next read too
}

// next is the next frame of a type; others are passed over.
func (f *framed) next(want http2.FrameType) frame {
	f.t.Helper()
	x, ok := f.within(want, patience())
	if !ok {
		f.t.Fatalf("no %v has come", want)
	}
	return x
}

// within is next for as long as d, or until the session ends.
func (f *framed) within(want http2.FrameType, d time.Duration) (frame, bool) {
	end := time.After(d)
	for {
		select {
		case x, ok := <-f.frames:
			if !ok || x.Type == want {
				return x, ok
			}
		case <-end:
			return frame{}, false
		}
	}
}

// ended waits for the end of the session, and says whether it came in time.
func (f *framed) ended(d time.Duration) bool {
	end := time.After(d)
	for {
		select {
		case _, ok := <-f.frames:
			if !ok {
				return true
			}
		case <-end:
			return false
		}
	}
}

// request is the next request: its stream.
func (f *framed) request() uint32 {
	f.t.Helper()
	return f.next(http2.FrameHeaders).StreamID
}

// respond answers a request.
func (f *framed) respond(stream uint32, status string, end bool) {
	f.do(func() error {
		f.buf.Reset()
		if err := f.enc.WriteField(hpack.HeaderField{Name: ":status", Value: status}); err != nil {
			return err
		}
		return f.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: f.buf.Bytes(), EndHeaders: true, EndStream: end})
	})
}

// echo sends one frame's data back, and returns it.
func (f *framed) echo() string {
	f.t.Helper()
	x := f.next(http2.FrameData)
	f.do(func() error { return f.fr.WriteData(x.StreamID, false, x.data) })
	return string(x.data)
}

// exchange has a client's text echoed by the server.
func (f *framed) exchange(c net.Conn, text string) error {
	f.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	return f.returns(c, text)
}

// returns is exchange once the client has said the text.
func (f *framed) returns(c net.Conn, text string) error {
	f.t.Helper()
	if got := f.echo(); got != text {
		return fmt.Errorf("the server got %q, want %q", got, text)
	}
	return lab.Expect(c, text)
}

// accepts answers the next request with 200, and has a client's text echoed on its
// stream.
func (f *framed) accepts(c net.Conn, text string) (stream uint32) {
	f.t.Helper()
	stream = f.request()
	f.respond(stream, "200", false)
	if err := f.exchange(c, text); err != nil {
		f.t.Fatal(err)
	}
	return stream
}
