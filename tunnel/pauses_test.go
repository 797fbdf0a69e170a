// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/record"
	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// An address whose session broke the rules waits a second for the next one: one of
// its connections does, and the others are refused. Others' do not wait.
func TestPauses(t *testing.T) {
	var p pauses
	now := time.Unix(1000, 0)
	next := func(i int, at time.Duration, wait time.Duration, want bool) {
		t.Helper()
		got, ok := p.next(address(i), now.Add(at))
		if ok != want || got != wait {
			t.Fatalf("address %d after %v: %v in %v, want %v in %v", i, at, ok, got, want, wait)
		}
	}
	next(0, 0, 0, true)
	p.breach(address(0), now)
	next(1, 0, 0, true)
	next(0, breachPause/4, breachPause*3/4, true)
	next(0, breachPause/4, breachPause*3/4, false) // another waits already
	next(0, breachPause, 0, true)                  // nothing was broken since
	next(0, breachPause, 0, true)
	if len(p.of) != 0 {
		t.Errorf("%d addresses are kept for nothing", len(p.of))
	}
	// Many at once: up to maxPause, and not beyond.
	for range int(maxPause/breachPause) + 5 {
		p.breach(address(0), now)
	}
	next(0, 0, maxPause, false)
	next(0, maxPause-breachPause-1, breachPause+1, false)
	next(0, maxPause-breachPause, breachPause, true)
	next(0, maxPause-breachPause, breachPause, false)
}

// As many addresses wait as are kept; of one more none is made to, until others have
// had their time.
func TestPausedAddresses(t *testing.T) {
	var p pauses
	now := time.Unix(1000, 0)
	for i := range maxPaused {
		p.breach(address(i), now)
	}
	p.breach(address(maxPaused), now)
	if _, ok := p.of[address(maxPaused)]; ok || len(p.of) != maxPaused {
		t.Fatalf("%d addresses are kept, want %d", len(p.of), maxPaused)
	}
	p.breach(address(7), now) // one that is known goes on
	if wait, ok := p.next(address(7), now); ok || wait != 2*breachPause {
		t.Errorf("a known address waits for %v (%v)", wait, ok)
	}
	p.breach(address(maxPaused), now.Add(breachPause))
	if want := 2; len(p.of) != want {
		t.Errorf("%d addresses are kept a second later, want %d", len(p.of), want)
	}
}

// A session's end is its peer's breach by what ended it.
func TestBreached(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{&h2.ConnError{Code: http2.ErrCodeEnhanceYourCalm}, true},
		{fmt.Errorf("read: %w", &h2.ConnError{Code: http2.ErrCodeProtocol}), true},
		{&record.LocalAlert{Alert: record.AlertUnexpectedMessage}, true},
		{&record.PeerAlert{Alert: record.AlertBadCertificate}, false},
		{relay.ErrUnread, false},
		{relay.ErrIdle, false},
		{relay.ErrTruncated, false},
		{io.EOF, false},
		{errors.New("connection reset by peer"), false},
	} {
		if got := breached(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}

// A wait ends early where there is nobody to wait for.
func TestSleep(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	if !sleep(ctx, 0) || !sleep(ctx, time.Millisecond) {
		t.Error("no wait")
	}
	cancel()
	if sleep(ctx, time.Hour) {
		t.Error("slept for an hour")
	}
}
