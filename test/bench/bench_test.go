// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/peer"
)

// TestMain is the bench itself where a site has started it again.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && commands[os.Args[1]] != nil {
		main()
		return
	}
	os.Exit(lab.Main(prefix, &ztunnel, m.Run))
}

// ztunnel is the daemon's binary.
var ztunnel string

// Every path that the machine has what it needs for carries every kind of work,
// and its proxies spend time on it. The lengths are for no figure.
func TestPaths(t *testing.T) {
	b := binaries{culvert: ztunnel, haproxy: "haproxy", ghostunnel: "../../out/peers/ghostunnel", ztunnel: os.Getenv("PEER_ZTUNNEL")}
	for _, p := range b.paths() {
		t.Run(p.name, func(t *testing.T) {
			if p.name == "envoy" {
				p.path = sidecar{program: peer.Envoy(t), kind: envoy{}} // which the tests are to have
			}
			if why := p.path.missing(); why != "" {
				t.Skip(why)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute*lab.Slowness())
			defer cancel()
			s, err := openSite(ctx, p)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := s.close(); err != nil {
					t.Error(err)
				}
			}()
			r := &report{Paths: []pathEntry{{Name: p.name}}}
			const d = 50 * time.Millisecond
			list := []work{bulkWork(1, modeSink, d), bulkWork(8, modeSource, d), requestWork(64, 32, d), connectWork(d), fixedWork(d), besideWork(d)}
			for _, w := range list {
				x, err := s.take(ctx, w)
				if err != nil {
					t.Fatalf("%s: %v", w.name, err)
				}
				if x.Bytes == 0 || x.Elapsed <= 0 || w.unit != "GB" && (x.Ops == 0 || x.P50 <= 0 || x.P99 < x.P50) {
					t.Errorf("%s: %+v", w.name, x)
				}
				if direct := p.name == "direct"; (x.CPU == 0) != direct {
					t.Errorf("%s: the proxies used %v", w.name, x.CPU)
				}
				r.Works = append(r.Works, workEntry{w.name, w.unit})
				r.Samples = append(r.Samples, x)
			}
			if p.name != "direct" {
				if _, err := s.idle(ctx, 50); err != nil {
					t.Error(err)
				}
			}
			dir := t.TempDir()
			if err := r.write(filepath.Join(dir, "raw.json")); err != nil {
				t.Fatal(err)
			}
			kept, err := readReport(filepath.Join(dir, "raw.json"))
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			if err := kept.show(&out); err != nil || !strings.Contains(out.String(), list[0].name) {
				t.Errorf("%v: %s", err, out.String())
			}
			if err := kept.draw(dir); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(dir, "rate.svg")); err != nil {
				t.Error(err)
			}
		})
	}
}

// A load that gets no answers ends with the context, so that a bench can be
// interrupted and takes away what it has made.
func TestLoadEndsWithItsContext(t *testing.T) {
	s, err := openSite(t.Context(), namedPath{"direct", direct{}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l, err := s.begin(ctx, load{Mode: modeEcho, Conns: 1, Size: 64, Idle: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if line, err := l.says.ReadString('\n'); err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	cancel()
	if _, err := l.wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
}

// A path that claims to protect, and does not, is not measured.
func TestPlaintextIsNotMeasured(t *testing.T) {
	s, err := openSite(t.Context(), namedPath{"liar", liar{}})
	if err == nil {
		s.close()
		t.Fatal("it was taken")
	}
	if !strings.Contains(err.Error(), "in plaintext between the nodes") {
		t.Error(err)
	}
}

// liar has a proxy that nothing goes through.
type liar struct{ direct }

func (liar) carry(_ context.Context, s *site, n *lab.Node, _ []*lab.Pod) error {
	s.proxies = append(s.proxies, proxy{n, os.Getpid()})
	return nil
}
