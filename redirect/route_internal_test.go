// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
)

// A list that changed while it was read is asked for again, so often and no more; any
// other error is told at once.
func TestDump(t *testing.T) {
	interrupted, other := fmt.Errorf("list: %w", netlink.ErrDumpInterrupted), errors.New("other")
	for name, tt := range map[string]struct {
		answers []error // the last one for ever
		asked   int
		err     error
	}{
		"at once":        {[]error{nil}, 1, nil},
		"at the third":   {[]error{interrupted, interrupted, nil}, 3, nil},
		"never":          {[]error{interrupted}, dumps, netlink.ErrDumpInterrupted},
		"another error":  {[]error{other}, 1, other},
		"another, later": {[]error{interrupted, other}, 2, other},
	} {
		asked := 0
		_, err := dump(func() ([]int, error) {
			asked++
			return nil, tt.answers[min(asked, len(tt.answers))-1]
		})
		if asked != tt.asked || !errors.Is(err, tt.err) {
			t.Errorf("%s: asked %d times, then %v; want %d, %v", name, asked, err, tt.asked, tt.err)
		}
	}
}
