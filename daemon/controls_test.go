// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// Who changes the level is in the log, also where there is nothing in it from then
// on.
func TestLevelChangesAreLogged(t *testing.T) {
	var level slog.LevelVar
	var said strings.Builder
	c := &controls{level: &level, log: slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: &level}))}
	for _, tt := range []struct{ asked, want string }{
		{"error", "from=info to=error\n"},
		{"error", ""},
		{"debug", "from=error to=debug\n"},
		{"info", "from=debug to=info\n"},
	} {
		said.Reset()
		w := httptest.NewRecorder()
		c.setLevel(w, httptest.NewRequest(http.MethodPost, "/log-level", strings.NewReader(`{"level": "`+tt.asked+`"}`)))
		if w.Code != http.StatusOK || levelName(&level) != tt.asked {
			t.Fatalf("asked for %s, it is %s: %d %s", tt.asked, levelName(&level), w.Code, w.Body)
		}
		if !strings.HasSuffix(said.String(), tt.want) || strings.Count(said.String(), "\n") != strings.Count(tt.want, "\n") {
			t.Errorf("%s: the log has %q, want %q", tt.asked, &said, tt.want)
		}
	}
	w := httptest.NewRecorder()
	c.setLevel(w, httptest.NewRequest(http.MethodPost, "/log-level", strings.NewReader(`{"level": "loud"}`)))
	if w.Code != http.StatusBadRequest || levelName(&level) != "info" {
		t.Errorf("loud: %d, and it is %s", w.Code, levelName(&level))
	}
}
