// SPDX-License-Identifier: Apache-2.0

// Package peer finds the foreign implementations that tests talk to.
package peer

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// Envoy is where scripts/peers has put its binary, or where PEER_ENVOY says. It is
// for tests of packages two folders deep.
func Envoy(t testing.TB) string {
	t.Helper()
	path := os.Getenv("PEER_ENVOY")
	if path == "" {
		path = "../../out/peers/envoy"
	}
	path, err := filepath.Abs(path)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		Absent(t, fmt.Sprintf("no Envoy here: run scripts/peers, or name its binary by PEER_ENVOY (%v)", err))
	}
	return path
}

// Absent ends a test whose peer is not here: a skip by hand, a failure where
// CULVERT_REQUIRE_PEERS says that it has to be here.
func Absent(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CULVERT_REQUIRE_PEERS") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}
