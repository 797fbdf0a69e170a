// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/netns"
)

// A pod whose namespace is not there does not keep the others from being served,
// and is enrolled once it is there.
func TestPodThatCannotBeEnrolledYet(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	traffic := e.steady(e.Pod(1, 1), app.Addr(4))
	late := entryOf(e.Pod(1, 3))
	path := filepath.Join(d[0].Node.Dir, "late")
	late.Netns = path
	e.setWorkloads(append(e.enrolled(), e.Pod(1, 3).Workload()), d...)
	e.reloads(d[0], "pods", "ok", func() {
		e.replace(d[0].Node, "pods.yaml", e.text("pods", []podEntry{entryOf(e.Pod(1, 1)), entryOf(e.Pod(1, 2)), late}))
	})
	e.must(lab.Until(e.ctx, "the failure is said", func() error {
		if log := d[0].LogTail(20); !strings.Contains(log, "pod is not enrolled") || !strings.Contains(log, path) {
			return errors.New("it is not in the log")
		}
		if n := e.sum(d[0], "culvert_pods", "state", "enrolling"); n != 1 {
			return fmt.Errorf("%v pods are enrolling", n)
		}
		return nil
	}))
	if s := e.status(d[0]); !strings.Contains(s, `"reason": "open network namespace`) || strings.Count(s, `"state": "ready"`) != 2 {
		t.Errorf("the status does not say why:\n%s", s)
	}
	e.must(os.Symlink(e.Pod(1, 3).NetnsPath(), path))
	e.settled(d[0], 3)
	e.carried(e.Pod(1, 3), app.Addr(4))
	traffic.whole(t, 1)
}

// The path of a pod leads to another namespace by now, and its file says nothing
// new: it is a new pod, and what was there is released.
func TestNamespaceBehindThePathIsReplaced(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	three, path := e.Pod(1, 3), filepath.Join(d[0].Node.Dir, "by-link")
	lead := func(to *lab.Pod) {
		e.must(os.Symlink(to.NetnsPath(), path+".new"))
		e.must(os.Rename(path+".new", path))
	}
	lead(three)
	entry := entryOf(three)
	entry.Netns = path
	e.setWorkloads(append(e.enrolled(), three.Workload()), d...)
	e.setPods(d[0], entryOf(e.Pod(1, 1)), entry)
	e.must(e.call(three, app.Addr(4)))
	held := e.connect(three, app.Addr(4))
	e.must(exchange(held, "before"))

	lead(e.Pod(1, 2)) // which has not this address
	if _, err := io.ReadAll(held); !isReset(err) {
		t.Errorf("a connection of the namespace that was replaced ended with %v, want a reset", err)
	}
	e.must(lab.Until(e.ctx, "nothing is left in the namespace that was replaced", func() error {
		if left := e.Nodes[0].State(three); left != "" {
			return errors.New(left)
		}
		if n := e.sum(d[0], "culvert_pods", "state", "enrolling"); n != 1 {
			return fmt.Errorf("%v pods are enrolling", n)
		}
		return nil
	}))
	lead(three)
	e.settled(d[0], 2)
	e.carried(three, app.Addr(4))
}

// The name of the namespace goes away first: the pod is still served, since who is
// in it is still there, and its release does not hang.
func TestNamespaceGone(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	two := e.Pod(1, 2)
	e.must(netns.DeleteNamed(filepath.Base(two.NetnsPath())))
	e.carried(two, app.Addr(4))
	e.setPods(d[0], entryOf(e.Pod(1, 1)))
	// What looks for links goes by the name.
	if left := strings.TrimPrefix(e.Nodes[0].State(two), "error: find namespace: no such file or directory"); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	e.must(d[0].Stop(e.ctx))
	out, err := d[0].Cleanup(e.ctx)
	e.must(err)
	if out == "" {
		t.Error("control: the release of a pod whose namespace is there reports nothing")
	}
}

// A pod that an earlier daemon has enrolled, and that the next one cannot enrol, is
// not released: it is listed, and stays refused until it can be.
func TestListedPodStaysRefused(t *testing.T) {
	e, d := mesh(t)
	app, err := e.Pod(2, 3).Echo(8080)
	e.must(err)
	secure, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	two := e.Pod(1, 2)
	path := filepath.Join(d[0].Node.Dir, "by-link")
	e.must(os.Symlink(two.NetnsPath(), path))
	entry := entryOf(two)
	entry.Netns = path
	e.setPods(d[0], entryOf(e.Pod(1, 1)), entry)
	e.must(e.call(two, secure.Addr(4)))

	d[0].Kill()
	e.must(os.Remove(path))
	wire := e.wire(marker)
	e.replace(e.Nodes[0], "listed.yaml", e.text("pods", []podEntry{entryOf(e.Pod(1, 1)), entry}))
	again := e.startOn(e.Nodes[0], lab.DaemonConfig{Settings: map[string]any{"pods": map[string]any{"file": "listed.yaml"}}})
	e.must(lab.Until(e.ctx, "the listed pod is tried", func() error {
		if n := e.sum(again, "culvert_pods", "state", "enrolling"); n != 1 {
			return fmt.Errorf("%v pods are enrolling", n)
		}
		return nil
	}))
	e.must(e.call(e.Pod(1, 1), secure.Addr(4)))
	if err := e.call(two, secure.Addr(4)); !isRefused(err) {
		t.Errorf("a listed pod that could not be enrolled: %v, want it refused", err)
	}
	e.must(os.Symlink(two.NetnsPath(), path))
	e.settled(again, 2)
	e.must(e.call(two, secure.Addr(4)))
	if wire.Seen(0) != 0 {
		t.Error("it was in plaintext meanwhile")
	}
	// The control: taken off the list, it is.
	e.reloads(again, "pods", "ok", func() { e.replace(e.Nodes[0], "listed.yaml", e.text("pods", []podEntry{entryOf(e.Pod(1, 1))})) })
	e.settled(again, 1)
	e.must(e.call(two, app.Addr(4)))
	if wire.Seen(0) == 0 {
		t.Error("control: the released pod's marker is not on the wire")
	}
}
