// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// crashes are what a daemon's death between two of its steps has left of a pod.
type crashes struct {
	nothing, part, all int
}

func (c *crashes) String() string {
	return fmt.Sprintf("%d left nothing in the pod, %d a part of it, %d all", c.nothing, c.part, c.all)
}

// crash is a mesh of which the first node's daemon dies at any point. Its second pod
// calls an application in plaintext while it is not enrolled.
type crash struct {
	*env
	cfg   lab.DaemonConfig
	whole string // what an enrolled pod looks like
	plain *lab.App
	app   *lab.App // that is in the mesh
}

func newCrash(t *testing.T) *crash {
	t.Helper()
	c := &crash{env: setup(t)}
	c.takes(scaled(2 * time.Minute))
	c.cfg = lab.DaemonConfig{Binary: ztunnel, Pods: c.Nodes[0].Pods[:2], Workloads: c.enrolled()}
	c.startOn(c.Nodes[1], lab.DaemonConfig{})
	var err error
	c.plain, err = c.Pod(2, 3).Echo(8080)
	c.must(err)
	c.app, err = c.Pod(2, 1).Echo(8080)
	c.must(err)
	return c
}

func (c *crash) pod() *lab.Pod { return c.Pod(1, 2) }

func (c *crash) state() string { return numbers.ReplaceAllString(c.Nodes[0].State(c.pod()), "$1") }

// written is what a daemon has written down of its pods.
func (c *crash) written(d *lab.Daemon) []string {
	files, _ := filepath.Glob(filepath.Join(d.RunDir(), "pods", "*.json"))
	return files
}

// start starts the first node's daemon with these pods, and wants those enrolled
// carried, with nothing in plaintext.
func (c *crash) start(pods []*lab.Pod) *lab.Daemon {
	c.t.Helper()
	cfg := c.cfg
	cfg.Pods = pods
	d := c.startOn(c.Nodes[0], cfg)
	wire := c.wire(marker)
	for _, p := range pods {
		for _, family := range []int{4, 6} {
			c.must(c.call(p, c.app.Addr(family)))
		}
	}
	if wire.Seen(0) != 0 || outside(wire) != 0 || inside(wire) == 0 {
		c.t.Error("a pod that is enrolled after a crash is in plaintext")
	}
	return d
}

// released wants nothing left of the pod, which connects as without the mesh.
func (c *crash) released(when string) {
	c.t.Helper()
	if left := c.state(); left != "" {
		c.t.Errorf("%s there is left:\n%s", when, left)
	}
	for _, family := range []int{4, 6} {
		if err := c.call(c.pod(), c.plain.Addr(family)); err != nil {
			c.t.Errorf("%s a pod that is not enrolled calls: %v", when, err)
		}
	}
}

// dead looks at the pod while no daemon runs: it is as if there were no mesh, or
// refused at once.
func (c *crash) dead(when string, seen *crashes) {
	c.t.Helper()
	left := c.state()
	for _, family := range []int{4, 6} {
		switch err := c.call(c.pod(), c.plain.Addr(family)); {
		case err != nil && !isRefused(err):
			c.t.Errorf("%s a call is neither carried as without the mesh nor refused: %v; in the pod there is\n%s", when, err, left)
		case err != nil && left == "":
			c.t.Errorf("%s a call of a pod that nobody touched is refused: %v", when, err)
		}
	}
	switch left {
	case "":
		seen.nothing++
	case c.whole:
		seen.all++
	default:
		seen.part++
	}
}

// enough is when so many rounds have met the middle; the machine decides where a
// death falls.
func (s *crashes) enough(round int) bool { return round >= 8 && s.part >= 2 || round >= 24 }

// search looks for the time between the first step and the last.
type search struct{ early, late time.Duration }

func (s search) next() time.Duration {
	return s.early + rand.N(max(s.late-s.early, 1))
}

// learn takes what a death after so long has left, and looks more closely. Where
// times were not what they seemed it goes back.
func (s *search) learn(after time.Duration, was, is crashes) {
	switch {
	case is.nothing > was.nothing:
		s.early = after
	case is.all > was.all:
		s.late = after
	}
	if width := s.late - s.early; width < scaled(4*time.Millisecond) {
		s.early, s.late = max(0, s.early-scaled(5*time.Millisecond)), s.late+scaled(5*time.Millisecond)
	}
}

// TestKillBetweenSteps: a daemon is killed at points all along the enrolment of its
// pods, and along a release. What it leaves is refused or untouched; the next daemon
// makes it whole, or cleanup takes it away, and nothing is left behind.
func TestKillBetweenSteps(t *testing.T) {
	t.Run("enrolment", func(t *testing.T) {
		c := newCrash(t)
		c.released("before any daemon")
		begun := time.Now()
		d := c.start(c.cfg.Pods)
		span := time.Since(begun)
		c.whole = c.state()
		if c.whole == "" {
			t.Error("control: nothing is found in an enrolled pod")
		}
		c.must(d.Stop(c.ctx))
		_, err := d.Cleanup(c.ctx)
		c.must(err)
		seen, where, round := &crashes{}, search{0, scaled(30 * time.Millisecond)}, 0
		for ; !seen.enough(round); round++ {
			d, err := c.Nodes[0].LaunchDaemon(c.cfg)
			c.must(err)
			after, was := where.next(), *seen
			when := fmt.Sprintf("killed %v after the first pod was written down", after.Round(time.Millisecond))
			if round%4 == 3 { // anywhere, before that too
				after = rand.N(span)
				when = fmt.Sprintf("killed %v after its start", after.Round(time.Millisecond))
			} else {
				for len(c.written(d)) == 0 && d.Ended() == nil && c.ctx.Err() == nil {
					<-time.After(100 * time.Microsecond)
				}
			}
			<-time.After(after)
			d.Kill()
			c.dead(when, seen)
			if round%4 != 3 {
				where.learn(after, was, *seen)
			}
			if round%2 == 0 { // else cleanup has to do with what the crash has left
				d = c.start(c.cfg.Pods)
				if is := c.state(); is != c.whole {
					t.Errorf("%s, and started again, a pod has\n%s\nand not\n%s", when, is, c.whole)
				}
				c.must(d.Stop(c.ctx))
			}
			_, err = d.Cleanup(c.ctx)
			c.must(err)
			c.released(when + ", and cleaned up,")
			if files := c.written(d); len(files) > 0 {
				t.Errorf("%s, and cleaned up, there is still %v", when, files)
			}
		}
		t.Logf("%d daemons were killed while they enrolled pods: %s", round, seen)
		if seen.nothing+seen.part == 0 {
			t.Error("control: no death fell before the last step")
		}
	})
	t.Run("release", func(t *testing.T) {
		c := newCrash(t)
		kept := c.cfg.Pods[:1]
		seen, where, round := &crashes{}, search{0, scaled(40 * time.Millisecond)}, 0 // where all is left it comes too early
		for ; !seen.enough(round); round++ {
			d := c.start(c.cfg.Pods)
			c.whole = c.state()
			c.replace(c.Nodes[0], "pods.yaml", c.text("pods", []podEntry{entryOf(kept[0])}))
			c.must(d.Signal(syscall.SIGHUP))
			after, was := where.next(), *seen
			<-time.After(after)
			d.Kill()
			when := fmt.Sprintf("killed %v after it was told to release a pod", after.Round(time.Millisecond))
			c.dead(when, seen)
			where.learn(after, crashes{nothing: was.all, all: was.nothing}, crashes{nothing: seen.all, all: seen.nothing})
			if round%2 == 0 {
				d = c.start(kept)
				c.released(when + ", and started again,")
				c.must(d.Stop(c.ctx))
			}
			_, err := d.Cleanup(c.ctx)
			c.must(err)
			c.released(when + ", and cleaned up,")
		}
		t.Logf("%d daemons were killed while they released a pod: %s", round, seen)
		if seen.nothing == 0 && seen.part == 0 {
			t.Error("control: no release had begun")
		}
	})
}
