// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"errors"
	"testing"

	"golang.org/x/net/http2"
)

// A stream that the peer makes us reset costs it what its own reset would:
// otherwise opening streams and breaking them makes work that no limit of
// concurrent streams bounds (CVE-2023-44487, CVE-2025-8671).
func TestFloodOfUnansweredStreams(t *testing.T) {
	flaws := map[string]func(w *script, id uint32){
		"taken back":             func(w *script, id uint32) { must(w.fr.WriteRSTStream(id, http2.ErrCodeCancel)) },
		"window update of 0":     func(w *script, id uint32) { w.raw(4, http2.FrameWindowUpdate, 0, id, "\x00\x00\x00\x00") },
		"window above the limit": func(w *script, id uint32) { w.raw(4, http2.FrameWindowUpdate, 0, id, "\x7f\xff\xff\xff") },
		"second HEADERS":         func(w *script, id uint32) { w.connect(id) },
		"data behind the end": func(w *script, id uint32) {
			must(w.fr.WriteData(id, true, nil))
			must(w.fr.WriteData(id, false, []byte{1}))
		},
	}
	for name, flaw := range flaws {
		t.Run(name, func(t *testing.T) {
			w := newScript(true)
			w.enc.SetMaxDynamicTableSize(0) // as our SETTINGS ask
			c := New(Config{})
			take(c)
			id, opened := uint32(1), 0
			var err error
			for err == nil && opened < 3*maxBudget {
				w.connect(id)
				flaw(w, id)
				id += 2
				var events []Event
				events, err = c.Receive(w.buf.Bytes())
				w.buf.Reset()
				take(c) // replies are read: they do not bound it
				for _, e := range events {
					if e.Kind == EventHeaders {
						opened++
					}
				}
			}
			var ce *ConnError
			if !errors.As(err, &ce) || ce.Code != http2.ErrCodeEnhanceYourCalm {
				t.Fatalf("after %d streams: %v, want ENHANCE_YOUR_CALM", opened, err)
			}
			if opened > maxBudget+1 {
				t.Errorf("%d streams were opened, want at most %d", opened, maxBudget+1)
			}
		})
	}
}
