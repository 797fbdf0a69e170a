// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"
)

var suites = []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256}

// pair makes both ends of a connection with secrets made of a counter.
func pair(t testing.TB, id uint16) (client, server *Layer) {
	t.Helper()
	su, err := suiteOf(id)
	if err != nil {
		t.Fatal(err)
	}
	secret := func(b byte) []byte { return bytes.Repeat([]byte{b}, su.hash) }
	if client, err = New(Secrets{Suite: id, Client: true, Read: secret(2), Write: secret(1)}); err != nil {
		t.Fatal(err)
	}
	if server, err = New(Secrets{Suite: id, Read: secret(1), Write: secret(2)}); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// seal makes a record of p.
func seal(l *Layer, p []byte) []byte {
	slot := make([]byte, len(p)+Overhead)
	copy(slot[HeaderLen:], p)
	return slot[:l.Seal(slot, len(p))]
}

// open opens all of b and returns the data.
func open(l *Layer, b []byte) ([]byte, error) {
	var all []byte
	for len(b) > 0 {
		data, n, err := l.Open(b)
		all = append(all, data...)
		if err != nil {
			return all, err
		}
		if n == 0 {
			return all, io.ErrUnexpectedEOF
		}
		b = b[n:]
	}
	return all, nil
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The application secrets and records of RFC 8448 section 3, in order of each
// direction's sequence numbers.
const (
	rfcClientSecret = "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5"
	rfcServerSecret = "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643"

	rfcData = `000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f
		202122232425262728292a2b2c2d2e2f3031`

	rfcTicket = `17030300de3a6b8f90414a97d6959c3487680de5134a2b240e6cffac116e95d4
		1d6af8f6b580dcf3d11d63c758db289a015940252f55713e061dc13e078891a3
		8efbcf5753ad8ef170ad3c7353d16d9da773b9ca7f2b9fa1b6c0d4a3d03f75e0
		9c30ba1e62972ac46f75f7b981be63439b2999ce13064615139891d5e4c5b406
		f16e3fc181a77ca475840025db2f0a77f81b5ab05b94c01346755f69232c8651
		9d86cbeeac87aac347d143f9605d64f650db4d023e70e952ca49fe5137121c74
		bc2697687e248746d6df353005f3bce18696129c8153556b3b6c6779b37bf159
		85684f`
	rfcServerData = `17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36
		e30efaf97d90e6dffc602dcb501a59a8fcc49c4bf2e5f0a21c0047c2abf33254
		0dd032e167c2955d`
	rfcServerClose = "1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9"

	rfcClientData = `1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f
		2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2977014bd1e3deae6
		3aeebb21694915e4`
	rfcClientClose = "1703030013c9872760655666b74d7ff1153efd6db6d0b0e3"
)

func TestRFC8448(t *testing.T) {
	client, err := New(Secrets{
		Suite: tls.TLS_AES_128_GCM_SHA256, Client: true,
		Read: unhex(t, rfcServerSecret), Write: unhex(t, rfcClientSecret),
	})
	if err != nil {
		t.Fatal(err)
	}
	server, err := New(Secrets{
		Suite: tls.TLS_AES_128_GCM_SHA256,
		Read:  unhex(t, rfcClientSecret), Write: unhex(t, rfcServerSecret),
	})
	if err != nil {
		t.Fatal(err)
	}
	data := unhex(t, rfcData)

	if got, want := seal(client, data), unhex(t, rfcClientData); !bytes.Equal(got, want) {
		t.Errorf("client's data:\n got %x\nwant %x", got, want)
	}
	if got, want := client.AppendAlert(nil, AlertCloseNotify), unhex(t, rfcClientClose); !bytes.Equal(got, want) {
		t.Errorf("client's close_notify:\n got %x\nwant %x", got, want)
	}
	got, err := open(server, append(unhex(t, rfcClientData), unhex(t, rfcClientClose)...))
	if !bytes.Equal(got, data) || err != io.EOF {
		t.Errorf("server opened %x, %v, want the data and EOF", got, err)
	}

	got, err = open(client, append(append(unhex(t, rfcTicket), unhex(t, rfcServerData)...), unhex(t, rfcServerClose)...))
	if !bytes.Equal(got, data) || err != io.EOF {
		t.Errorf("client opened %x, %v, want the data and EOF", got, err)
	}
	server.out.next() // the ticket, which we never send
	if got, want := seal(server, data), unhex(t, rfcServerData); !bytes.Equal(got, want) {
		t.Errorf("server's data:\n got %x\nwant %x", got, want)
	}
	if got, want := server.AppendAlert(nil, AlertCloseNotify), unhex(t, rfcServerClose); !bytes.Equal(got, want) {
		t.Errorf("server's close_notify:\n got %x\nwant %x", got, want)
	}
}

func TestSealThenOpen(t *testing.T) {
	for _, id := range suites {
		t.Run(tls.CipherSuiteName(id), func(t *testing.T) {
			client, server := pair(t, id)
			for _, n := range []int{1, 2, 15, 16, 17, 1000, MaxPlaintext - 1, MaxPlaintext, 0, 5} {
				p := bytes.Repeat([]byte{0xa5}, n)
				for _, way := range []struct{ from, to *Layer }{{client, server}, {server, client}} {
					r := seal(way.from, p)
					if len(r) != n+Overhead {
						t.Fatalf("record of %d bytes for %d", len(r), n)
					}
					for cut := 0; cut < len(r); cut += 1 + len(r)/7 {
						if d, k, err := way.to.Open(r[:cut:cut]); d != nil || k != 0 || err != nil {
							t.Fatalf("%d of %d bytes: %x, %d, %v", cut, len(r), d, k, err)
						}
					}
					d, k, err := way.to.Open(append(r, 0xff))
					if err != nil || k != len(r) || !bytes.Equal(d, p) {
						t.Fatalf("open %d bytes: %d of data, n %d, %v", n, len(d), k, err)
					}
				}
			}
		})
	}
}

// Data that the caller keeps while the next record is opened must not be written
// over by appending to it.
func TestOpenLimitsCapacity(t *testing.T) {
	client, server := pair(t, suites[0])
	b := append(seal(client, []byte("one")), seal(client, []byte("two"))...)
	d, n, err := server.Open(b)
	if err != nil || cap(d) != 3 {
		t.Fatalf("cap %d, %v", cap(d), err)
	}
	if d, _, err = server.Open(b[n:]); err != nil || string(d) != "two" {
		t.Fatalf("%q, %v", d, err)
	}
}

// inner seals any TLSInnerPlaintext: p is content, type and padding.
func inner(l *Layer, p []byte) []byte {
	return l.appendRecord(nil, p[len(p)-1], p[:len(p)-1])
}

func message(typ byte, body ...byte) []byte {
	return append([]byte{typ, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

func typed(typ byte, p ...[]byte) []byte { return append(bytes.Join(p, nil), typ) }

func TestViolations(t *testing.T) {
	ticket := message(messageNewSessionTicket, make([]byte, 100)...)
	update := message(messageKeyUpdate, updateNotRequested)
	app := []byte{typeApplicationData}
	for _, tc := range []struct {
		name   string
		inner  [][]byte // each a record of the peer
		raw    []byte   // instead of inner
		server bool     // we are the server
		want   uint8    // alert; 0: none
		detail string
	}{
		{name: "change_cipher_spec", raw: []byte{typeChangeCipherSpec, 3, 3, 0, 1, 1}, want: AlertUnexpectedMessage, detail: "type 20"},
		{name: "unprotected alert", raw: []byte{typeAlert, 3, 3, 0, 2, 2, 40}, want: AlertUnexpectedMessage, detail: "type 21"},
		{name: "HTTP", raw: []byte("GET / HTTP/1.1\r\n"), want: AlertUnexpectedMessage, detail: "type 71"},
		{name: "too long", raw: []byte{typeApplicationData, 3, 3, (maxCiphertext + 1) >> 8, (maxCiphertext + 1) & 0xff}, want: AlertRecordOverflow, detail: "16402"},
		{name: "longest record", raw: append([]byte{typeApplicationData, 3, 3, maxCiphertext >> 8, maxCiphertext & 0xff}, make([]byte, maxCiphertext)...), want: AlertBadRecordMAC},
		{name: "longest length", raw: []byte{typeApplicationData, 3, 3, 0xff, 0xff}, want: AlertRecordOverflow, detail: "65535"},
		{name: "empty", raw: []byte{typeApplicationData, 3, 3, 0, 0}, want: AlertBadRecordMAC},
		{name: "shorter than a tag", raw: append([]byte{typeApplicationData, 3, 3, 0, 15}, make([]byte, 15)...), want: AlertBadRecordMAC},
		{name: "garbage", raw: append([]byte{typeApplicationData, 3, 3, 0, 40}, make([]byte, 40)...), want: AlertBadRecordMAC},
		{name: "only padding", inner: [][]byte{make([]byte, 100)}, want: AlertUnexpectedMessage, detail: "without a type"},
		{name: "unknown inner type", inner: [][]byte{{1, 2, 24}}, want: AlertUnexpectedMessage, detail: "inner type 24"},
		{name: "inner change_cipher_spec", inner: [][]byte{{1, typeChangeCipherSpec}}, want: AlertUnexpectedMessage, detail: "inner type 20"},
		{name: "empty handshake", inner: [][]byte{{typeHandshake}}, want: AlertUnexpectedMessage, detail: "empty"},
		{name: "empty alert", inner: [][]byte{{typeAlert}}, want: AlertDecodeError},
		{name: "half an alert", inner: [][]byte{{2, typeAlert}}, want: AlertDecodeError},
		{name: "two alerts", inner: [][]byte{{1, 90, 1, 0, typeAlert}}, want: AlertDecodeError},
		{name: "post-handshake certificate request", inner: [][]byte{typed(typeHandshake, message(13, 0, 0))}, want: AlertUnexpectedMessage, detail: "type 13"},
		{name: "finished again", inner: [][]byte{typed(typeHandshake, message(20, make([]byte, 32)...))}, want: AlertUnexpectedMessage},
		{name: "client hello", inner: [][]byte{typed(typeHandshake, message(1, make([]byte, 32)...))}, server: true, want: AlertUnexpectedMessage},
		{name: "ticket to a server", inner: [][]byte{typed(typeHandshake, ticket)}, server: true, want: AlertUnexpectedMessage},
		{name: "empty ticket", inner: [][]byte{typed(typeHandshake, message(messageNewSessionTicket))}, want: AlertDecodeError},
		{name: "huge ticket", inner: [][]byte{{messageNewSessionTicket, 1, 0, 1, typeHandshake}}, want: AlertDecodeError, detail: "65537"},
		{name: "KeyUpdate without a byte", inner: [][]byte{typed(typeHandshake, message(messageKeyUpdate))}, want: AlertDecodeError},
		{name: "KeyUpdate of two bytes", inner: [][]byte{typed(typeHandshake, message(messageKeyUpdate, 0, 0))}, want: AlertDecodeError},
		{name: "KeyUpdate asks for 2", inner: [][]byte{typed(typeHandshake, message(messageKeyUpdate, 2))}, want: AlertIllegalParameter},
		{name: "message behind KeyUpdate", inner: [][]byte{typed(typeHandshake, update, ticket)}, want: AlertUnexpectedMessage, detail: "behind KeyUpdate"},
		{name: "data inside a split message", inner: [][]byte{typed(typeHandshake, ticket[:50]), append([]byte("x"), app...)}, want: AlertUnexpectedMessage, detail: "inside"},
		{name: "data inside a split header", inner: [][]byte{typed(typeHandshake, update[:2]), append([]byte("x"), app...)}, want: AlertUnexpectedMessage, detail: "inside"},
		{name: "empty data inside a split message", inner: [][]byte{typed(typeHandshake, ticket[:50]), app}, want: AlertUnexpectedMessage},

		{name: "ticket", inner: [][]byte{typed(typeHandshake, ticket)}},
		{name: "two tickets in one", inner: [][]byte{typed(typeHandshake, ticket, ticket), append([]byte("x"), app...)}},
		{name: "ticket in three", inner: [][]byte{typed(typeHandshake, ticket[:1]), typed(typeHandshake, ticket[1:4]), typed(typeHandshake, ticket[4:]), append([]byte("x"), app...)}},
		{name: "largest ticket", inner: largestTicket()},
		{name: "empty data", inner: [][]byte{app, app, append([]byte("x"), app...)}},
		{name: "padding", inner: [][]byte{append([]byte{1, 2, 0, typeApplicationData}, make([]byte, 1000)...)}},
		{name: "most padding", inner: [][]byte{append([]byte{1, typeApplicationData}, make([]byte, MaxPlaintext-1)...)}},
		{name: "data ends in zeros", inner: [][]byte{{0, 0, 0, typeApplicationData}}},
		{name: "user_canceled", inner: [][]byte{{1, AlertUserCanceled, typeAlert}, append([]byte("x"), app...)}},
		{name: "ticket and KeyUpdate", inner: [][]byte{typed(typeHandshake, ticket, update)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			us, peer := pair(t, suites[0])
			if tc.server {
				us, peer = peer, us
			}
			stream := tc.raw
			for _, p := range tc.inner {
				stream = append(stream, inner(peer, p)...)
			}
			_, err := open(us, stream)
			if tc.want == 0 {
				if err != nil {
					t.Fatalf("got %v, want nothing", err)
				}
				return
			}
			var la *LocalAlert
			if !errors.As(err, &la) || la.Alert != tc.want || !strings.Contains(la.Detail, tc.detail) {
				t.Fatalf("got %v, want %s with %q", err, AlertName(tc.want), tc.detail)
			}
			if _, _, again := us.Open(stream); again != err {
				t.Errorf("then %v, want the same error", again)
			}
			// The owner can still tell the peer.
			var pa *PeerAlert
			if _, err := open(peer, us.AppendAlert(nil, la.Alert)); !errors.As(err, &pa) || pa.Alert != tc.want {
				t.Errorf("peer got %v, want %s", err, AlertName(tc.want))
			}
		})
	}
}

// largestTicket is a ticket of maxMessage bytes over as many records as it needs.
func largestTicket() [][]byte {
	m := message(messageNewSessionTicket, make([]byte, maxMessage)...)
	m[1], m[2], m[3] = maxMessage>>16, byte(maxMessage>>8&0xff), 0
	var out [][]byte
	for len(m) > 0 {
		k := min(len(m), MaxPlaintext)
		out = append(out, typed(typeHandshake, m[:k]))
		m = m[k:]
	}
	return out
}

func TestAlerts(t *testing.T) {
	for a := range 256 {
		us, peer := pair(t, suites[0])
		_, n, err := us.Open(peer.AppendAlert(nil, uint8(a)))
		var pa *PeerAlert
		switch {
		case a == AlertCloseNotify:
			if err != io.EOF {
				t.Errorf("close_notify: %v", err)
			}
		case a == AlertUserCanceled:
			if err != nil || n != HeaderLen+2+typeLen+tagLen {
				t.Errorf("user_canceled: %d, %v", n, err)
			}
		case !errors.As(err, &pa) || pa.Alert != uint8(a):
			t.Errorf("alert %d: %v", a, err)
		}
		// A level says nothing in TLS 1.3.
		us, peer = pair(t, suites[0])
		if _, _, err := us.Open(inner(peer, []byte{1, byte(a), typeAlert})); (err == nil) != (a == AlertUserCanceled) {
			t.Errorf("alert %d as a warning: %v", a, err)
		}
	}
	us, _ := pair(t, suites[0])
	first := us.AppendAlert([]byte("x"), AlertCloseNotify)
	if again := us.AppendAlert(first, AlertInternalError); len(again) != len(first) {
		t.Error("a second alert was sent")
	}
}

func TestUselessRecords(t *testing.T) {
	update := typed(typeHandshake, message(messageKeyUpdate, updateNotRequested))
	kinds := map[string]func(peer *Layer) []byte{
		"empty": func(peer *Layer) []byte { return inner(peer, []byte{typeApplicationData}) },
		"padding": func(peer *Layer) []byte {
			return inner(peer, append([]byte{typeApplicationData}, make([]byte, 500)...))
		},
		"user_canceled": func(peer *Layer) []byte { return inner(peer, []byte{1, AlertUserCanceled, typeAlert}) },
		"ticket":        func(peer *Layer) []byte { return inner(peer, typed(typeHandshake, message(4, 1, 2, 3))) },
		"KeyUpdate": func(peer *Layer) []byte {
			r := inner(peer, update)
			if err := peer.out.update(peer.suite); err != nil {
				panic(err)
			}
			return r
		},
	}
	for name, one := range kinds {
		t.Run(name, func(t *testing.T) {
			us, peer := pair(t, suites[0])
			for range 3 { // data in between allows as many again
				for i := range maxUseless {
					if _, err := open(us, one(peer)); err != nil {
						t.Fatalf("record %d: %v", i, err)
					}
				}
				if d, err := open(us, seal(peer, []byte("x"))); err != nil || string(d) != "x" {
					t.Fatalf("%q, %v", d, err)
				}
			}
			for range maxUseless {
				if _, err := open(us, one(peer)); err != nil {
					t.Fatal(err)
				}
			}
			var la *LocalAlert
			if _, err := open(us, one(peer)); !errors.As(err, &la) || la.Alert != AlertUnexpectedMessage {
				t.Fatalf("got %v, want unexpected_message", err)
			}
		})
	}
}

func TestSealPanicsOnSmallSlot(t *testing.T) {
	us, _ := pair(t, suites[0])
	for _, tc := range []struct{ room, n int }{{10 + Overhead - 1, 10}, {SlotLen + 1, MaxPlaintext + 1}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("sealed %d bytes in a slot of %d", tc.n, tc.room)
				}
			}()
			us.Seal(make([]byte, tc.room), tc.n)
		}()
	}
}

func TestNewRefuses(t *testing.T) {
	for name, s := range map[string]Secrets{
		"TLS 1.2 suite": {Suite: tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, Read: make([]byte, 32), Write: make([]byte, 32)},
		"short read":    {Suite: tls.TLS_AES_128_GCM_SHA256, Read: make([]byte, 31), Write: make([]byte, 32)},
		"no write":      {Suite: tls.TLS_AES_256_GCM_SHA384, Read: make([]byte, 48)},
		"wrong hash":    {Suite: tls.TLS_AES_256_GCM_SHA384, Read: make([]byte, 32), Write: make([]byte, 32)},
	} {
		if _, err := New(s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
