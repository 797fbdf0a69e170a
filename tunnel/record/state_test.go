// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/tls"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"testing"
)

// refreeze freezes l and thaws its state after a way through gob and JSON.
func refreeze(t *testing.T, l *Layer) *Layer {
	t.Helper()
	read, write := l.in.secret, l.out.secret
	st := l.Freeze()
	var buf bytes.Buffer
	if err := gob.NewEncoder(&buf).Encode(st); err != nil {
		t.Fatal(err)
	}
	var viaGob, viaJSON State
	if err := gob.NewDecoder(&buf).Decode(&viaGob); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(viaGob)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &viaJSON); err != nil {
		t.Fatal(err)
	}
	st.Wipe()
	if !bytes.Equal(read, make([]byte, len(read))) || !bytes.Equal(write, make([]byte, len(write))) {
		t.Error("secrets left in a frozen layer")
	}
	if _, _, err := l.Open([]byte("GET / HTTP/1.1")); err != ErrUnusable {
		t.Errorf("a frozen layer opens: %v", err)
	}
	if n := l.Seal(make([]byte, 100), 10); n != 0 {
		t.Error("a frozen layer seals")
	}
	if l.NeedsControl() || len(l.Due(nil))+len(l.UpdateKeys(nil, true))+len(l.AppendAlert(nil, 0)) > 0 {
		t.Error("a frozen layer sends")
	}
	thawed, err := Thaw(viaJSON)
	if err != nil {
		t.Fatal(err)
	}
	return thawed
}

// A conversation with everything in it, both ends frozen and thawed between any
// two records.
func TestFreezeAndThawBetweenAnyRecords(t *testing.T) {
	for _, id := range suites {
		t.Run(tls.CipherSuiteName(id), func(t *testing.T) {
			client, server := pair(t, id)
			say := func(from, to **Layer, make func(l *Layer) []byte, want string) {
				t.Helper()
				b := make(*from)
				*from = refreeze(t, *from)
				got := ""
				for len(b) > 0 {
					*to = refreeze(t, *to)
					d, n, err := (*to).Open(b)
					if err != nil || n == 0 {
						t.Fatalf("open: %d, %v", n, err)
					}
					got += string(d)
					b = b[n:]
				}
				if got != want {
					t.Fatalf("got %q, want %q", got, want)
				}
			}
			data := func(s string) func(*Layer) []byte {
				return func(l *Layer) []byte { return seal(l, []byte(s)) }
			}
			ticket := message(messageNewSessionTicket, make([]byte, 300)...)
			for i := range 3 {
				s := fmt.Sprint("message ", i)
				say(&client, &server, data(s), s)
				say(&server, &client, data(s), s)
				say(&server, &client, func(l *Layer) []byte { // a ticket in four pieces
					b := inner(l, typed(typeHandshake, ticket[:2]))
					b = append(b, inner(l, typed(typeHandshake, ticket[2:4]))...)
					b = append(b, inner(l, typed(typeHandshake, ticket[4:20]))...)
					return append(b, inner(l, typed(typeHandshake, ticket[20:]))...)
				}, "")
				say(&server, &client, func(l *Layer) []byte { return l.UpdateKeys(nil, true) }, "")
				if !client.NeedsControl() {
					t.Fatal("the reply that was due is lost")
				}
				say(&client, &server, func(l *Layer) []byte { return l.Due(nil) }, "")
				say(&client, &server, data("new key"), "new key")
				say(&server, &client, data("new key"), "new key")
			}
			b := client.AppendAlert(nil, AlertCloseNotify)
			client = refreeze(t, client)
			if len(client.AppendAlert(nil, AlertCloseNotify)) > 0 {
				t.Error("a second alert after a thaw")
			}
			if _, _, err := server.Open(b); err != io.EOF {
				t.Errorf("close_notify: %v", err)
			}
		})
	}
}

func TestFreezeOfAnEndedLayer(t *testing.T) {
	us, peer := pair(t, suites[0])
	secret := us.in.secret
	if _, _, err := us.Open(peer.AppendAlert(nil, AlertCloseNotify)); err != io.EOF {
		t.Fatal(err)
	}
	if _, err := Thaw(us.Freeze()); err == nil {
		t.Error("an ended connection was thawed")
	}
	if _, _, err := us.Open(nil); err != io.EOF {
		t.Errorf("the first error is lost: %v", err)
	}
	if !bytes.Equal(secret, make([]byte, len(secret))) {
		t.Error("secret left")
	}
	us.Close()
	peer.Close()
	peer.Close()
	if _, _, err := peer.Open(nil); !errors.Is(err, ErrUnusable) {
		t.Errorf("closed: %v", err)
	}
}

func TestThawRefuses(t *testing.T) {
	ok := State{
		Suite: tls.TLS_AES_128_GCM_SHA256,
		Read:  Direction{Secret: make([]byte, 32)}, Write: Direction{Secret: make([]byte, 32)},
	}
	for name, change := range map[string]func(*State){
		"zero":              func(s *State) { *s = State{} },
		"unknown suite":     func(s *State) { s.Suite = 0x1304 },
		"short secret":      func(s *State) { s.Read.Secret = make([]byte, 16) },
		"no secret":         func(s *State) { s.Write.Secret = nil },
		"long message":      func(s *State) { s.Message = make([]byte, 6) },
		"negative rest":     func(s *State) { s.MessageLeft = -1 },
		"rest of a GB":      func(s *State) { s.MessageLeft = 1 << 30 },
		"useless too often": func(s *State) { s.Useless = maxUseless + 1 },
	} {
		s := ok
		change(&s)
		if _, err := Thaw(s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := Thaw(ok); err != nil {
		t.Errorf("a good one: %v", err)
	}
}
