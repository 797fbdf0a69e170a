// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"crypto/tls"
	"errors"
	"testing"
)

func mustOpen(t *testing.T, l *Layer, b []byte, want string) {
	t.Helper()
	if d, err := open(l, b); err != nil || string(d) != want {
		t.Fatalf("opened %q, %v, want %q", d, err, want)
	}
}

func TestKeyUpdate(t *testing.T) {
	for _, id := range suites {
		t.Run(tls.CipherSuiteName(id), func(t *testing.T) {
			us, peer := pair(t, id)
			old := us.in.secret

			mustOpen(t, us, peer.UpdateKeys(nil, false), "")
			if us.NeedsControl() {
				t.Error("an update that asks for nothing is answered")
			}
			if !bytes.Equal(old, make([]byte, len(old))) {
				t.Error("the old secret is still there")
			}
			mustOpen(t, us, seal(peer, []byte("second key")), "second key")

			// Two requests before we send: one answer, before the data.
			mustOpen(t, us, peer.UpdateKeys(peer.UpdateKeys(nil, true), true), "")
			if !us.NeedsControl() {
				t.Fatal("a request is not answered")
			}
			old = us.out.secret
			b := us.Due([]byte("x"))
			if b[0] != 'x' || us.NeedsControl() || len(us.Due(nil)) != 0 {
				t.Error("Due is not one record behind what was there")
			}
			if !bytes.Equal(old, make([]byte, len(old))) {
				t.Error("the old secret is still there")
			}
			if n := HeaderLen + 5 + typeLen + tagLen; len(b) != 1+n {
				t.Errorf("answer of %d bytes, want %d", len(b)-1, n)
			}
			if !peer.asked {
				t.Error("peer does not wait")
			}
			mustOpen(t, peer, append(b[1:], seal(us, []byte("hello"))...), "hello")
			if peer.asked || peer.NeedsControl() {
				t.Error("the answer was itself answered")
			}
			mustOpen(t, us, seal(peer, []byte("fourth key")), "fourth key")
		})
	}
}

// What was sealed before an update opens only before it: a record that comes
// late is no record.
func TestKeyUpdateEndsTheOldKey(t *testing.T) {
	us, peer := pair(t, suites[0])
	late := seal(peer, []byte("late"))
	peer.out.seq-- // as if it had not been sent
	mustOpen(t, us, peer.UpdateKeys(nil, false), "")
	var la *LocalAlert
	if _, err := open(us, late); !errors.As(err, &la) || la.Alert != AlertBadRecordMAC {
		t.Fatalf("got %v, want bad_record_mac", err)
	}
}

func TestReplayAndReorderingAreRefused(t *testing.T) {
	for name, order := range map[string][]int{"replay": {0, 0}, "reorder": {1, 0}, "gap": {0, 2}} {
		us, peer := pair(t, suites[0])
		r := [][]byte{seal(peer, []byte("a")), seal(peer, []byte("b")), seal(peer, []byte("c"))}
		var err error
		for _, i := range order {
			if _, err = open(us, bytes.Clone(r[i])); err != nil {
				break
			}
		}
		var la *LocalAlert
		if !errors.As(err, &la) || la.Alert != AlertBadRecordMAC {
			t.Errorf("%s: got %v, want bad_record_mac", name, err)
		}
	}
}

// Each direction's own limit, RFC 8446 section 5.5.
func TestKeysAreUpdatedBeforeTheyWearOut(t *testing.T) {
	us, peer := pair(t, suites[0])
	us.out.seq, peer.in.seq = rekeyAfter-1, rekeyAfter-1
	peer.out.seq, us.in.seq = rekeyAfter-1, rekeyAfter-1

	if us.NeedsControl() {
		t.Fatal("due too early")
	}
	mustOpen(t, peer, seal(us, []byte("last")), "last")
	if !us.NeedsControl() {
		t.Fatal("our key is worn out and nothing is due")
	}
	mustOpen(t, peer, us.Due(nil), "")
	if us.out.seq != 0 || peer.in.seq != 0 || peer.reply || peer.asked {
		t.Errorf("our write key: %d, their read key: %d, reply %v", us.out.seq, peer.in.seq, peer.reply)
	}

	// Now the peer's own, which it does not update by itself, as crypto/tls.
	mustOpen(t, us, seal(peer, []byte("x")), "x")
	b := us.Due(nil)
	if len(b) == 0 || us.NeedsControl() {
		t.Fatal("peer is not asked once")
	}
	mustOpen(t, us, seal(peer, []byte("under way")), "under way")
	if us.NeedsControl() {
		t.Error("peer is asked twice")
	}
	mustOpen(t, peer, b, "")
	mustOpen(t, us, peer.Due(nil), "")
	if us.in.seq != 0 || us.asked || us.NeedsControl() {
		t.Errorf("read key: %d, asked %v", us.in.seq, us.asked)
	}
	mustOpen(t, us, seal(peer, []byte("y")), "y")
	mustOpen(t, peer, seal(us, []byte("z")), "z")
}

func TestWornKeySealsNothing(t *testing.T) {
	us, _ := pair(t, suites[0])
	us.out.seq = maxSealed - 1
	slot := make([]byte, SlotLen)
	if n := us.Seal(slot, 1); n == 0 {
		t.Fatal("the last record was refused")
	}
	if n := us.Seal(slot, 1); n != 0 {
		t.Fatal("a record too many was sealed")
	}
	if len(us.Due(nil)) == 0 || us.Seal(slot, 1) == 0 {
		t.Fatal("an update does not help")
	}
}

func TestNothingIsDueAfterAnAlert(t *testing.T) {
	us, peer := pair(t, suites[0])
	mustOpen(t, us, peer.UpdateKeys(nil, true), "")
	us.AppendAlert(nil, AlertCloseNotify)
	if us.NeedsControl() || len(us.Due(nil)) > 0 || len(us.UpdateKeys(nil, true)) > 0 {
		t.Fatal("KeyUpdate after the last alert")
	}
	mustOpen(t, us, seal(peer, []byte("half closed")), "half closed")
}
