// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/tunnel/loop"
)

// A stream's window doubles with what its application takes, up to its limit, and
// comes back to it where there are others meanwhile.
func TestWindowIsBounded(t *testing.T) {
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	l.Stop()
	l.Run() // closes it
	w := NewWorker(l, nil)
	tr := &Trunk{w: w, peer: w.budget.Account()}
	var f flow
	f.reset(startWindow)
	grow := func(limit int) {
		t.Helper()
		f.drained = 0
		for want := 2 * f.window; f.window < limit; want = 2 * f.window {
			f.since = time.Time{} // it is no elephant
			if got := f.took(tr, f.window-1); got != 0 {
				t.Fatalf("a window of %d after a byte too few", got)
			}
			if got := f.took(tr, 1); got != want {
				t.Fatalf("a window of %d, want %d", got, want)
			}
		}
		f.since = time.Time{}
		if got := f.took(tr, f.window); got != 0 || f.window != limit {
			t.Fatalf("a window of %d, then of %d, at the limit of %d", f.window, got, limit)
		}
	}
	tr.count = 2
	grow(sharedWindow)
	tr.count = 1
	grow(aloneWindow)
	tr.count = 2
	if got := f.took(tr, 1); got != sharedWindow {
		t.Errorf("beside another stream a window of %d, want %d", got, sharedWindow)
	}
}
