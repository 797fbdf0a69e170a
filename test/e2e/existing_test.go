// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// command runs a command of ztunnel for a daemon.
func (e *env) command(d *lab.Daemon, args ...string) string {
	e.t.Helper()
	cmd := exec.CommandContext(e.ctx, ztunnel, append(args, "--config", d.ConfigFile)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		e.t.Fatalf("ztunnel %v: %v: %s", args, err, &stderr)
	}
	return string(out)
}

// plaintext are the plaintext connections that a daemon lists: kind, pod,
// direction, source and destination.
func (e *env) plaintext(d *lab.Daemon) []string {
	e.t.Helper()
	var list struct {
		Connections []struct {
			Kind, Pod, Direction string
			Source, Destination  struct{ Address netip.AddrPort }
		}
		Failed map[string]string
	}
	e.must(json.Unmarshal([]byte(e.command(d, "connections", "--plaintext", "-o", "json")), &list))
	if len(list.Failed) > 0 {
		e.t.Errorf("pods of %s could not be looked at: %v", d.Node.Name, list.Failed)
	}
	var out []string
	for _, c := range list.Connections {
		out = append(out, fmt.Sprintf("%s %s %s %s %s", c.Kind, c.Pod, c.Direction, c.Source.Address, c.Destination.Address))
	}
	return out
}

func key(p *lab.Pod) string { return p.Namespace + "_" + p.Name }

// existing is how a connection from before the enrolment is listed at one end.
func existing(p *lab.Pod, direction string, c *net.TCPConn) string {
	return fmt.Sprintf("existing %s %s %s %s", key(p), direction, c.LocalAddr(), c.RemoteAddr())
}

// settings are those of a daemon that does something with existing connections.
func settings(existing string) lab.DaemonConfig {
	return lab.DaemonConfig{Settings: map[string]any{"existing": existing}}
}

// A connection from before the enrolment goes on in plaintext: at both ends it is
// said so, listed and counted until it ends, by the next daemon too. New ones are
// carried, and are not listed.
func TestExistingConnections(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e := setup(t)
		one, two := e.Pod(1, 1), e.Pod(2, 1)
		app, err := two.Echo(8080)
		e.must(err)
		old := e.connect(one, app.Addr(family))
		e.must(exchange(old, "before"))

		d := e.start(settings("keep"))
		wire := e.wire(marker)
		e.must(exchange(old, marker))
		if wire.Seen(0) == 0 {
			t.Error("control: the old connection's marker is not on the wire")
		}
		listed := func(when string) {
			t.Helper()
			for i, want := range []string{existing(one, "outbound", old), existing(two, "inbound", old)} {
				if got := e.plaintext(d[i]); len(got) != 1 || got[0] != want {
					t.Errorf("%s: %s lists %q, want %q", when, d[i].Node.Name, got, want)
				}
				pod := []*lab.Pod{one, two}[i]
				if n := e.sum(d[i], "culvert_existing_connections", "pod", key(pod)); n != 1 {
					t.Errorf("%s: %s counts %v", when, d[i].Node.Name, n)
				}
				if n := e.sum(d[i], "culvert_existing_connections"); n != 1 {
					t.Errorf("%s: %s counts %v in all", when, d[i].Node.Name, n)
				}
			}
		}
		listed("enrolled")
		for _, d := range d {
			if log := d.LogTail(30); !strings.Contains(log, "older than its enrolment") || !strings.Contains(log, "existing: reset") {
				t.Errorf("%s does not say so:\n%s", d.Node.Name, log)
			}
		}
		again := e.wire(marker)
		carried := e.connect(one, app.Addr(family))
		e.must(exchange(carried, marker))
		if again.Seen(0) != 0 {
			t.Error("a new connection is in plaintext")
		}
		listed("beside one that is carried")
		if list := e.command(d[0], "connections"); !strings.Contains(list, carried.LocalAddr().String()) || strings.Contains(list, old.LocalAddr().String()) {
			t.Errorf("the new one is to be among those carried, and the old one not:\n%s", list)
		}

		for _, d := range d {
			e.must(d.Stop(e.ctx))
		}
		d = e.start(settings("keep"))
		e.must(exchange(old, "after"))
		listed("by the next daemon")

		e.must(old.CloseWrite())
		if _, err := io.ReadAll(old); err != nil {
			t.Errorf("the old connection ended with %v", err)
		}
		old.Close()
		e.must(lab.Until(e.ctx, "none is listed and counted", func() error {
			for _, d := range d {
				if l := e.plaintext(d); len(l) != 0 {
					return fmt.Errorf("%s lists %q", d.Node.Name, l)
				}
				if n := e.sum(d, "culvert_existing_connections"); n != 0 {
					return fmt.Errorf("%s counts %v", d.Node.Name, n)
				}
			}
			return nil
		}))
	})
}

// With existing: reset they are ended, at both ends, and nothing of them is on the
// wire any more.
func TestExistingConnectionsAreReset(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		for name, enrolled := range map[string]int{"at the client's node": 1, "at the server's node": 2} {
			t.Run(name, func(t *testing.T) {
				e := setup(t)
				one, two := e.Pod(1, 1), e.Pod(2, 1)
				ended := make(chan error, 1)
				app, err := two.Serve(8080, func(c *net.TCPConn) {
					_, err := io.Copy(c, c)
					ended <- err
				})
				e.must(err)
				neighbour, err := e.Pod(2, 3).Echo(8080) // not of the mesh
				e.must(err)
				old, plain := e.connect(one, app.Addr(family)), e.connect(one, neighbour.Addr(family))
				wire := e.wire(marker)
				e.must(exchange(old, marker))
				if wire.Seen(0) == 0 {
					t.Error("control: the old connection's marker is not on the wire")
				}
				cfg := settings("reset")
				cfg.Settings["mesh"] = map[string]any{"cidrs": []string{}}
				d := e.startOn(e.Nodes[enrolled-1], cfg)

				again := e.wire(marker)
				if err := exchange(old, marker); !isReset(err) && !isAborted(err) {
					t.Errorf("the client's end: %v, want a reset", err)
				}
				select {
				case err := <-ended:
					if !isReset(err) && !isAborted(err) {
						t.Errorf("the server's end: %v, want a reset", err)
					}
				case <-time.After(10 * time.Second * lab.Slowness()):
					t.Error("the server's end goes on")
				}
				if again.Seen(0) != 0 {
					t.Error("the marker is on the wire after the reset")
				}
				if l := e.plaintext(d); len(l) != 0 {
					t.Errorf("listed after the reset: %q", l)
				}
				if log := d.LogTail(30); !strings.Contains(log, "they are reset") {
					t.Errorf("the log does not say so:\n%s", log)
				}
				e.must(exchange(plain, "beyond the mesh"))
			})
		}
	})
}

func isAborted(err error) bool {
	return err != nil && strings.Contains(err.Error(), "software caused connection abort")
}

// An address that comes to the mesh while a pod is connected to it: the connection
// is one from before, too.
func TestExistingConnectionOfANewWorkload(t *testing.T) {
	e := setup(t)
	d := e.start(lab.DaemonConfig{Settings: map[string]any{"mesh": map[string]any{"cidrs": []string{}}}})
	three := e.Pod(2, 3)
	app, err := three.Echo(8080)
	e.must(err)
	old := e.connect(e.Pod(1, 1), app.Addr(4))
	e.must(exchange(old, "before"))
	if l := e.plaintext(d[0]); len(l) != 0 {
		t.Errorf("control: an address beyond the mesh is listed: %q", l)
	}
	e.setWorkloads(append(e.enrolled(), three.Workload()), d[0])
	e.must(lab.Until(e.ctx, "it is counted", func() error {
		if n := e.sum(d[0], "culvert_existing_connections"); n != 1 {
			return fmt.Errorf("%v are", n)
		}
		return nil
	}))
	if l, want := e.plaintext(d[0]), existing(e.Pod(1, 1), "outbound", old); len(l) != 1 || l[0] != want {
		t.Errorf("listed: %q, want %q", l, want)
	}
	// It goes on when the pod is released, and that is said too.
	e.setPods(d[0], entryOf(e.Pod(1, 2)))
	e.must(exchange(old, "after"))
	if log := d[0].LogTail(10); !strings.Contains(log, "pod released") || !strings.Contains(log, "older_than_enrolment=1") {
		t.Errorf("the release does not say so:\n%s", log)
	}
}

// Plaintext that the mode lets in goes through the tunnel: it is listed as such,
// and never as one from before the enrolment; what is carried is not listed.
func TestPermissiveIsListed(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := permissive(t)
		two, stranger := e.Pod(2, 1), e.Pod(1, 3)
		app, err := two.Echo(8080)
		e.must(err)
		carried := e.connect(e.Pod(1, 1), app.Addr(family))
		e.must(exchange(carried, "carried"))
		if l := e.plaintext(d[1]); len(l) != 0 {
			t.Errorf("control: before it there are %q", l)
		}
		c := e.connect(stranger, app.Addr(family))
		e.must(exchange(c, "plain"))
		want := fmt.Sprintf("permissive %s inbound %s %s", key(two), c.LocalAddr(), c.RemoteAddr())
		if l := e.plaintext(d[1]); len(l) != 1 || l[0] != want {
			t.Errorf("listed: %q, want %q", l, want)
		}
		if n := e.sum(d[1], "culvert_existing_connections"); n != 0 {
			t.Errorf("%v are counted as from before the enrolment", n)
		}
		c.Close()
		e.must(lab.Until(e.ctx, "none is listed", func() error {
			if l := e.plaintext(d[1]); len(l) != 0 {
				return fmt.Errorf("%q are", l)
			}
			return nil
		}))
	})
}

// What the daemon and its connections are is told to who asks.
func TestStatusAndConnections(t *testing.T) {
	families(t, func(t *testing.T, family int) {
		e, d := mesh(t)
		one, two := e.Pod(1, 1), e.Pod(2, 1)
		app, err := two.Echo(8080)
		e.must(err)
		for command, wants := range map[string][]string{
			"status":    {fmt.Sprint("process ", d[0].PID()), "ready", "2 ready", d[0].RunDir()},
			"pods":      {key(one), one.Addr(4).String(), one.Identity(), "ends in "},
			"workloads": {one.Namespace + "/" + one.Name, two.Addr(4).String(), two.Identity(), "hbone"},
			"certs":     {"root", "└ ", one.Identity(), "good"},
		} {
			out := e.command(d[0], command)
			for _, want := range wants {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in the %s:\n%s", want, command, out)
				}
			}
		}
		if out := e.command(d[0], "connections"); out != "No connections.\n" {
			t.Errorf("control: before there is one: %s", out)
		}
		c := e.connect(one, app.Addr(family))
		e.must(exchange(c, "twelve bytes"))
		for i, direction := range []string{"outbound", "inbound"} {
			list := e.command(d[i], "connections")
			for _, want := range []string{direction, c.LocalAddr().String(), app.Addr(family).String(), "mutual_tls", one.Identity(), two.Identity(), " 12 B "} {
				if !strings.Contains(list, want) {
					t.Errorf("no %q in the list of %s:\n%s", want, d[i].Node.Name, list)
				}
			}
		}
		c.Close()
		e.must(lab.Until(e.ctx, "no connection is listed", func() error {
			for _, d := range d {
				if out := e.command(d, "connections"); out != "No connections.\n" {
					return fmt.Errorf("%s: %s", d.Node.Name, out)
				}
			}
			return nil
		}))
		e.reloads(d[0], "pods", "error", func() { e.replace(d[0].Node, "pods.yaml", "pods: 5\n") })
		if status := e.command(d[0], "status"); !strings.Contains(status, "not taken") || !strings.Contains(status, "pods.yaml:1:") {
			t.Errorf("a broken file is not in the status:\n%s", status)
		}
	})
}
