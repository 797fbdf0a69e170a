// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

const prefix = "culvert-demotest"

// mute makes the stand-in never ready.
const mute = "CULVERT_DEMO_TEST_MUTE"

// TestMain lets this binary stand in for a ztunnel that is ready and carries nothing, and for the demo itself.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "run":
			standIn()
		case "cleanup":
			os.Exit(0)
		case "demo":
			os.Args = append(os.Args[:1], os.Args[2:]...)
			main()
		}
	}
	os.Exit(m.Run())
}

func standIn() {
	http.HandleFunc("/metrics", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("/healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		if os.Getenv(mute) != "" {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	http.ListenAndServe("127.0.0.1:15020", nil)
	os.Exit(1)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("the demo makes network namespaces: run this test as root")
	}
}

// The demo is no demo if it cannot fail: with a ztunnel that carries nothing, the lines about the wire and the logs
// are marked, what the applications saw still holds, and the exit status says so.
func TestNoTunnelIsMarked(t *testing.T) {
	needRoot(t)
	var out strings.Builder
	code, err := run(t.Context(), &out, options{ztunnel: os.Args[0], prefix: prefix})
	if code != exitBroken || err != nil {
		t.Errorf("exit status %d, %v; want %d", code, err, exitBroken)
	}
	for _, want := range []string{
		"✓ web's client, IPv4", "✓ web's client, IPv6", "✓ mail spoke first, IPv6",
		"✗ node1's access log", "✗ segments with payload", "✗ bytes on port 15008", "✗ the clients' secret",
		"lines do not hold",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q", want)
		}
	}
	if t.Failed() {
		t.Log(out.String())
	}
}

func TestNoDaemonIsMarked(t *testing.T) {
	needRoot(t)
	var out strings.Builder
	code, err := run(t.Context(), &out, options{ztunnel: "/bin/true", prefix: prefix})
	if code != exitBroken || err != nil || !strings.Contains(out.String(), "✗ both are ready") {
		t.Errorf("exit status %d, %v\n%s", code, err, out.String())
	}
}

// Ctrl-C in the middle cleans up; kill -9 does not, but the next run does.
func TestEndedInTheMiddle(t *testing.T) {
	needRoot(t)
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			demo := exec.CommandContext(ctx, os.Args[0], "demo", "-ztunnel", os.Args[0], "-prefix", prefix)
			demo.Env = append(os.Environ(), mute+"=1")
			out, err := demo.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := demo.Start(); err != nil {
				t.Fatal(err)
			}
			// It waits for the daemons from here on; which ones, the sweep below knows.
			for s := bufio.NewScanner(out); s.Scan(); {
				if strings.HasPrefix(s.Text(), "The same traffic twice") {
					break
				}
			}
			if err := lab.Until(ctx, "a daemon runs", func() error { return daemonsRun() }); err != nil {
				t.Fatal(err)
			}
			demo.Process.Signal(signal)
			io.Copy(io.Discard, out)
			demo.Wait()
			removed, err := lab.Sweep(ctx, prefix)
			if err != nil {
				t.Error(err)
			}
			if want := map[syscall.Signal]int{syscall.SIGINT: 0, syscall.SIGKILL: 1}[signal]; len(removed) != want {
				t.Errorf("%d labs were left, want %d", len(removed), want)
			}
			if left, _ := filepath.Glob("/run/netns/" + prefix + "-*"); len(left) > 0 {
				t.Errorf("left behind: %s", left)
			}
		})
	}
}

// daemonsRun returns nil once a demo has started both of its daemons.
func daemonsRun() error {
	journals, _ := filepath.Glob(filepath.Join(lab.StateDir, prefix+"-*", "journal"))
	for _, j := range journals {
		b, err := os.ReadFile(j)
		if err == nil && strings.Count(string(b), `["process"`) == 2 {
			return nil
		}
	}
	return os.ErrNotExist
}
