// SPDX-License-Identifier: Apache-2.0

package relay

import "time"

// A stream's window bounds what is in flight for it, and so what a small
// request beside it has to wait for: the sum of its siblings' windows over the
// rate. Bulk that is alone on its session wants 4 MiB; beside others it gets
// the larger of 256 KiB and twice its bandwidth-delay product.
const (
	startWindow  = 64 << 10  // bytes
	sharedWindow = 256 << 10 // bytes
	aloneWindow  = 4 << 20   // bytes

	// A stream that moves this many bytes within elephantTime is an
	// elephant: new streams avoid its session for elephantMemory.
	elephantBytes  = 1 << 20
	elephantTime   = 100 * time.Millisecond
	elephantMemory = 2 * time.Second
)

// flow decides how large a stream's receive window is to be.
type flow struct {
	window  int       // the present target, bytes
	drained int       // since the window last grew
	since   time.Time // beginning of the present rate measurement
	moved   int       // bytes since then, both directions
	fast    bool      // the measurement before was an elephant's
}

func (f *flow) reset(window int) { *f = flow{window: window} }

// took notes that the application took n bytes, and returns the new window
// when it is to change, else 0.
func (f *flow) took(t *Trunk, n int) int {
	f.count(t, n)
	f.drained += n
	limit := t.windowLimit()
	switch {
	case f.window > limit:
		f.window = limit
	case f.drained >= f.window && f.window < limit:
		f.window = min(2*f.window, limit)
	default:
		return 0
	}
	f.drained = 0
	return f.window
}

// count notes moved bytes of either direction and marks the trunk when they
// make an elephant.
func (f *flow) count(t *Trunk, n int) {
	f.moved += n
	if f.moved < elephantBytes {
		return
	}
	now := t.w.Loop.Now()
	d := now.Sub(f.since)
	if f.fast = d <= elephantTime; f.fast {
		t.elephant.Store(now.Add(elephantMemory).UnixNano())
		t.measure(now)
		if d > 0 {
			t.rate = float64(f.moved) / d.Seconds()
		}
	}
	f.since = now
	f.moved = 0
}

// elephant reports whether the stream moves much at present.
func (f *flow) elephant(now time.Time) bool { return f.fast && now.Sub(f.since) <= elephantTime }

// windowLimit is how far a stream's window may grow now.
func (t *Trunk) windowLimit() int {
	if t.peer.tight() {
		return startWindow
	}
	if t.count == 1 {
		return aloneWindow
	}
	bdp := int(t.rate * t.rtt.Seconds())
	return min(max(sharedWindow, 2*bdp), aloneWindow)
}
