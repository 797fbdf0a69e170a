// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// kind is one way to be hostile.
type kind struct {
	workers int             // that run at once; 0: 1
	run     func(*attacker) // again and again, until the time is over
	serve   func(*session)  // of a server, for each session once it was asked something; instead of run
	foreign bool            // with a certificate of another trust domain
	least   float64         // frames a second that make it an attack, some twentieth of what it does; connections where it sends none
	// shows is the control: what says that the attack was what it is called.
	shows func(result) error
	limit string // of culvert_peer_limits_total, that must have been met; empty: none
	// breaks: its sessions are ended for breaking the rules.
	breaks bool
}

// ends wants connections to have ended in a way, and frames to have gone before.
func ends(why string, least, frames int64) func(result) error {
	return func(r result) error {
		if r.Ends[why] < least || r.Frames < frames*r.Ends[why] {
			return fmt.Errorf("want at least %d ends by %q, after %d frames each", least, why, frames)
		}
		return nil
	}
}

// answers wants the daemon to have said something so often.
func answers(what string, least int64) func(result) error {
	return func(r result) error {
		if r.Answers[what] < least {
			return fmt.Errorf("want at least %d answers %q", least, what)
		}
		return nil
	}
}

const calm = "ENHANCE_YOUR_CALM"

// whole is the budget of frames of no use: tunnel/h2's.
const whole = 1000

var kinds = map[string]kind{
	// Before there is a session.
	"half-open handshakes": {least: 50, workers: 600, run: connected(func(_ *attacker, c net.Conn) error {
		_, err := io.Copy(io.Discard, c)
		return err
	}), shows: ends("reset", 100, 0), limit: "source_handshakes"},
	"slow handshakes": {least: 300, workers: 100, run: connected(func(a *attacker, c net.Conn) error {
		var err error
		for _, b := range append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}, make([]byte, 500)...) {
			if _, err = c.Write([]byte{b}); err != nil {
				break
			}
			a.frames.Add(1)
			select {
			case <-time.After(20 * time.Millisecond):
			case <-a.ctx.Done():
			}
		}
		return err
	}), shows: func(r result) error {
		if r.Connections < 100 || r.Ends["reset"]+r.Ends["closed"]+r.Held < 100 {
			return errors.New("want each to be ended by the handshake's time, or held until the attack's end")
		}
		return nil
	}},
	"garbage instead of TLS": {least: 200, workers: 16, run: connected(func(a *attacker, c net.Conn) error {
		b := make([]byte, 4096)
		_, _ = rand.Read(b)
		n, _ := c.Write(b)
		a.bytes.Add(int64(n))
		_, err := io.Copy(io.Discard, c)
		return err
	}), shows: func(r result) error {
		if r.Ends["closed"]+r.Ends["reset"] < 100 {
			return errors.New("want at least 100 ends")
		}
		return nil
	}},
	"huge ClientHello": {least: 50, workers: 8, run: connected(func(a *attacker, c net.Conn) error {
		// A message of 16 MiB, as its header says, in full records.
		hello := append([]byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff, 3, 3}, make([]byte, 0x4000-6)...)
		more := append([]byte{22, 3, 1, 0x40, 0}, make([]byte, 0x4000)...)
		_, err := c.Write(hello)
		for err == nil {
			a.bytes.Add(int64(len(more)))
			_, err = c.Write(more)
		}
		return err
	}), shows: func(r result) error {
		if n := r.Ends["reset"] + r.Ends["closed"]; n < 50 {
			return errors.New("want at least 50 ends")
		}
		return nil
	}},
	"certificate of another trust domain": {least: 20, workers: 4, foreign: true, run: func(a *attacker) {
		if s := a.open(false); s != nil {
			s.hold()
		}
	}, shows: func(r result) error {
		for why, n := range r.Ends {
			if strings.Contains(why, "unknown certificate authority") && n >= 50 {
				return nil
			}
		}
		return errors.New("want at least 50 ends by unknown_ca")
	}},
	"many sessions": {least: 5, workers: 300, run: func(a *attacker) {
		if s := a.open(false); s != nil {
			s.hold()
		}
	}, shows: func(r result) error {
		if r.Sessions < 128 || r.Held < 100 || r.Ends["reset"]+r.Ends["closed"] < 100 {
			return errors.New("want at least 128 sessions, 100 held until the attack's end, and 100 connections refused")
		}
		return nil
	}, limit: "sessions"},

	// Records.
	"empty records": {breaks: true, least: 5000, run: records(func(s *session, wire []byte) []byte {
		return append(wire, s.slot[:s.layer.Seal(s.slot, 0)]...)
	}), shows: ends("unexpected message", 10, 33)},
	"KeyUpdates": {breaks: true, least: 1000, run: records(func(s *session, wire []byte) []byte {
		return s.layer.UpdateKeys(wire, true)
	}), shows: ends("unexpected message", 10, 33)},

	// Frames.
	"rapid reset": {breaks: true, least: 20_000, run: flood(false, func(s *session) {
		id := s.connect(s.a.App)
		s.frame(http2.FrameRSTStream, 0, id, []byte{0, 0, 0, 8})
	}), shows: ends(calm, 10, whole), limit: "calm"},
	"MadeYouReset": {breaks: true, least: 20_000, run: flood(false, func(s *session) {
		id := s.connect(s.a.App)
		s.frame(http2.FrameWindowUpdate, 0, id, make([]byte, 4))
	}), shows: ends(calm, 10, whole), limit: "calm"},
	"SETTINGS":       {breaks: true, least: 100_000, run: flood(false, func(s *session) { s.frame(http2.FrameSettings, 0, 0, nil) }), shows: ends(calm, 10, whole), limit: "calm"},
	"PING, read":     {least: 50_000, run: paced(2000, func(s *session) { s.frame(http2.FramePing, 0, 0, make([]byte, 8)) }), shows: pings},
	"PING, not read": {breaks: true, least: 100_000, run: flood(true, func(s *session) { s.frame(http2.FramePing, 0, 0, make([]byte, 8)) }), shows: sent(10), limit: "calm"},
	"CONTINUATION": {breaks: true, least: 100_000, run: func(a *attacker) {
		if s := a.open(false); s != nil {
			s.frame(http2.FrameHeaders, 0, 1, s.headers(":method", "CONNECT"))
			s.flood(func() { s.frame(http2.FrameContinuation, 0, 1, []byte{0x20}) })
		}
	}, shows: ends(calm, 10, 17), limit: "calm"},
	"header list bomb": {breaks: true, least: 5, run: func(a *attacker) {
		s := a.open(false)
		if s == nil {
			return
		}
		// SETTINGS are never acknowledged: the table of 4,096 bytes stays.
		big := hpack.NewEncoder(&s.block)
		s.block.Reset()
		_ = big.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("%", 4000)})
		for s.block.Len() < 15<<10 {
			_ = big.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("%", 4000)})
		}
		first := s.block.String()
		s.frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, []byte(first))
		indexed := []byte(strings.Repeat("\xbe", 15<<10)) // 61 MB each
		id := uint32(3)
		s.flood(func() {
			s.frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, id, indexed)
			id += 2
		})
	}, shows: ends(calm, 10, 1), limit: "calm"},
	"window overflow": {breaks: true, least: 50_000, workers: 2, run: flood(false, func(s *session) {
		s.frame(http2.FrameWindowUpdate, 0, 0, []byte{0x7f, 0xff, 0xff, 0xff})
	}), shows: ends("FLOW_CONTROL_ERROR", 10, 1)},
	"tiny window updates": {breaks: true, least: 50_000, run: flood(false, func(s *session) {
		s.frame(http2.FrameWindowUpdate, 0, 0, []byte{0, 0, 0, 1})
	}), shows: ends(calm, 10, whole), limit: "calm"},
	"PRIORITY":       {breaks: true, least: 50_000, run: flood(false, func(s *session) { s.frame(http2.FramePriority, 0, 1, make([]byte, 5)) }), shows: ends(calm, 10, whole), limit: "calm"},
	"unknown frames": {breaks: true, least: 20_000, run: flood(false, func(s *session) { s.frame(0xbe, 0, 0, make([]byte, 100)) }), shows: ends(calm, 10, whole), limit: "calm"},
	"empty DATA": {breaks: true, least: 100_000, run: func(a *attacker) {
		if s := a.open(false); s != nil {
			id := s.connect(a.App)
			s.flood(func() { s.frame(http2.FrameData, 0, id, nil) })
		}
	}, shows: ends(calm, 10, whole), limit: "calm"},
	"data to closed streams": {breaks: true, least: 50_000, run: func(a *attacker) {
		if s := a.open(false); s != nil {
			id := s.connect(a.App)
			s.frame(http2.FrameRSTStream, 0, id, []byte{0, 0, 0, 8})
			s.flood(func() { s.frame(http2.FrameData, 0, id, []byte("late")) })
		}
	}, shows: ends(calm, 10, whole), limit: "calm"},

	// Streams.
	"streams opened and left": {least: 300, run: func(a *attacker) {
		s := a.open(false)
		if s == nil {
			return
		}
		for range 6000 {
			s.connect(a.App)
			if len(s.out) > 1000 && !s.flush() {
				break
			}
		}
		s.flush()
		s.hold()
	}, shows: func(r result) error {
		return errors.Join(answers("status 200", 2000)(r), answers("RST_STREAM REFUSED_STREAM", 500)(r))
	}},
	"zero windows": {least: 50, run: func(a *attacker) {
		s := a.open(false, http2.Setting{ID: http2.SettingInitialWindowSize})
		if s == nil {
			return
		}
		for range 1000 {
			s.connect(a.Loud)
		}
		s.flush()
		s.hold()
	}, shows: func(r result) error {
		if r.Answers["DATA"] > 0 {
			return errors.New("data came into windows of 0")
		}
		return answers("status 200", 900)(r)
	}},
	"hoarders": {least: 200, run: func(a *attacker) {
		s := a.open(false)
		if s == nil {
			return
		}
		data := make([]byte, 16<<10)
		for range 3000 {
			id := s.connect(a.Deaf)
			for range 4 { // 64 KiB, less a byte too many for the protocol's window
				s.frame(http2.FrameData, 0, id, data[:65535/4])
			}
			if !s.flush() {
				break
			}
		}
		s.hold()
	}, shows: answers("status 200", 64), limit: "queued"},
	"CONNECT to a closed port": {least: 500, run: paced(500, func(s *session) { s.connect(s.a.Closed) }), shows: answers("status 503", 500)},
	// Servers.
	"server: SETTINGS": {breaks: true, least: 50_000, serve: served(func(s *session) { s.frame(http2.FrameSettings, 0, 0, nil) }), shows: ends(calm, 10, whole), limit: "calm"},
	"server: GOAWAY":   {breaks: true, least: 50_000, serve: served(func(s *session) { s.frame(http2.FrameGoAway, 0, 0, []byte{0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0}) }), shows: ends(calm, 10, whole), limit: "calm"},
	"server: header list bomb": {breaks: true, least: 50, serve: func(s *session) {
		block := []byte("\x08\x03200" + strings.Repeat("\x84", 15<<10)) // status, then 15,360 fields
		s.flood(func() { s.frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, s.id, block) })
	}, shows: ends(calm, 10, 1), limit: "calm"},
	"server: more than the window": {breaks: true, least: 100, serve: func(s *session) {
		s.frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, s.id, s.headers(":status", "200"))
		s.flood(func() { s.frame(http2.FrameData, 0, s.id, make([]byte, 16<<10)) })
	}, shows: func(r result) error {
		if r.Ends[calm]+r.Ends["FLOW_CONTROL_ERROR"] < 3 {
			return errors.New("want at least 3 ends by the rules of flow control")
		}
		return nil
	}},

	"a peer that does not read": {least: 10, run: func(a *attacker) {
		s := a.open(true, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
		if s == nil {
			return
		}
		for range 100 {
			s.connect(a.Loud)
		}
		s.frame(http2.FrameWindowUpdate, 0, 0, []byte{0x70, 0, 0, 0})
		if s.flush() { // all was asked for
			<-a.ctx.Done()
			a.held.Add(1)
		}
		s.close()
	}, shows: func(r result) error {
		if r.Held == 0 {
			return errors.New("no session was held")
		}
		return nil
	}},
}

// connected does something with a connection that is no session yet, until the
// connection ends by what is returned.
func connected(f func(*attacker, net.Conn) error) func(*attacker) {
	return func(a *attacker) {
		if c := a.dial(); c != nil {
			a.ended(f(a, c))
			c.Close()
		}
	}
}

// served is a server's flood.
func served(f func(*session)) func(*session) {
	return func(s *session) { s.flood(func() { f(s) }) }
}

// flood is one session after the other, each with frames until it is over.
func flood(deaf bool, f func(*session)) func(*attacker) {
	return func(a *attacker) {
		if s := a.open(deaf); s != nil {
			s.flood(func() { f(s) })
		}
	}
}

// paced is a flood of which so much at most has not been answered.
func paced(most int64, f func(*session)) func(*attacker) {
	return func(a *attacker) {
		s := a.open(false)
		if s == nil {
			return
		}
		defer s.close()
		for sent := int64(0); ; {
			for sent-s.heard.Load() < most {
				f(s)
				sent++
			}
			if !s.flush() {
				return
			}
			for sent-s.heard.Load() > most/2 {
				select {
				case <-s.over:
					return
				case <-time.After(100 * time.Microsecond):
				}
			}
		}
	}
}

// records is a flood of records that hold no data.
func records(next func(s *session, wire []byte) []byte) func(*attacker) {
	return func(a *attacker) {
		s := a.open(false)
		if s == nil {
			return
		}
		defer s.close()
		for {
			var wire []byte
			for range 100 {
				wire = next(s, wire)
				a.frames.Add(1)
			}
			if !s.write(wire) {
				return
			}
		}
	}
}

// pings wants many to have been answered, and no session ended: they are read.
func pings(r result) error {
	if r.Answers["PING"] < 10*whole || len(r.Ends) > 0 {
		return fmt.Errorf("want at least %d answers and no end", 10*whole)
	}
	return nil
}

// sent wants sessions, one after the other.
func sent(least int64) func(result) error {
	return func(r result) error {
		if r.Sessions < least || r.Frames < least*whole {
			return fmt.Errorf("want at least %d sessions, of %d frames each", least, whole)
		}
		return nil
	}
}
