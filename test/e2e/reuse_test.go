// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// named answers each marker with its own name, of five letters.
func (e *env) named(p *lab.Pod, name string) *lab.App {
	e.t.Helper()
	app, err := p.Serve(8080, func(c *net.TCPConn) {
		for {
			if _, err := io.ReadFull(c, make([]byte, len(marker))); err != nil {
				return
			}
			if _, err := io.WriteString(c, name); err != nil {
				return
			}
		}
	})
	e.must(err)
	return app
}

// restless asks without a pause, on a connection that stays as long as it can and
// on one each, and counts who answered.
type restless struct {
	first, other, failed atomic.Int64
	cancel               context.CancelFunc
	wg                   sync.WaitGroup
}

func (e *env) restless(from *lab.Pod, to netip.AddrPort) *restless {
	ctx, cancel := context.WithCancel(e.ctx)
	r := &restless{cancel: cancel}
	for _, keep := range []bool{true, false} {
		r.wg.Go(func() {
			var c *net.TCPConn
			for ctx.Err() == nil {
				err := func() (err error) {
					if c == nil {
						dial, cancel := context.WithTimeout(ctx, patience())
						defer cancel()
						if c, err = from.Dial(dial, to); err != nil {
							c = nil
							return err
						}
					}
					_ = c.SetDeadline(time.Now().Add(patience()))
					if _, err := io.WriteString(c, marker); err != nil {
						return err
					}
					name := make([]byte, 5)
					if _, err := io.ReadFull(c, name); err != nil {
						return err
					}
					if string(name) == "first" {
						r.first.Add(1)
					} else {
						r.other.Add(1)
					}
					return nil
				}()
				if err != nil {
					r.failed.Add(1)
				}
				if c != nil && (err != nil || !keep) {
					c.Close()
					c = nil
				}
			}
			if c != nil {
				c.Close()
			}
		})
	}
	e.t.Cleanup(r.end)
	return r
}

func (r *restless) end() { r.cancel(); r.wg.Wait() }

// more waits until a counter has grown by n.
func (e *env) more(what string, c *atomic.Int64, n int64) {
	e.t.Helper()
	was := c.Load()
	e.must(lab.Until(e.ctx, what, func() error {
		if is := c.Load(); is < was+n {
			return fmt.Errorf("%d, and %d before", is, was)
		}
		return nil
	}))
}

// A pod is deleted and another identity gets its address, in the pod's own network
// namespace or in a new one, while a client never pauses: whichever node hears of it
// first, nothing that was meant for one of them reaches the other.
func TestReusedAddress(t *testing.T) {
	for _, tc := range []struct {
		name  string
		moved bool // to a new namespace
		early bool // the client's node hears of it before the pod's own
	}{{"in place", false, false}, {"new namespace", true, false}, {"client hears first", true, true}} {
		t.Run(tc.name, func(t *testing.T) {
			families(t, func(t *testing.T, family int) { reusedAddress(t, family, tc.moved, tc.early) })
		})
	}
}

func reusedAddress(t *testing.T, family int, moved, early bool) {
	e, d := mesh(t)
	e.takes(time.Minute * lab.Slowness())
	const account = "successor"
	first := e.named(e.Pod(2, 1), "first")
	from, dst := e.Pod(1, 1), first.Addr(family)
	held := e.connect(from, dst)
	_, err := io.WriteString(held, marker)
	e.must(err)
	_, err = io.ReadFull(held, make([]byte, 5))
	e.must(err)
	handshakes := func() float64 { return e.sum(d[0], successes) }
	before := handshakes()
	client := e.restless(from, dst)
	e.more("the first answers", &client.first, 50)
	if n := handshakes(); n != before {
		t.Errorf("control: the session is not reused, %v handshakes more", n-before)
	}
	known := e.enrolled()
	known[2].Name, known[2].ServiceAccount = account, account

	// ended wants an error of the held connection. Where the network is gone nothing is
	// heard before something is said; the kernel says an error once, to who asks first.
	ended := func(what string) {
		t.Helper()
		_ = held.SetDeadline(time.Now().Add(patience()))
		e.must(lab.Until(e.ctx, what+" is reset", func() error {
			_, giving := io.WriteString(held, marker)
			_, taking := io.ReadFull(held, make([]byte, 5))
			if !isReset(giving) && !isReset(taking) {
				return fmt.Errorf("giving %v, taking %v", giving, taking)
			}
			return nil
		}))
	}

	if early {
		e.setWorkloads(known, d[0])
		ended("a connection to the first")
		e.more("calls are refused", &client.failed, 20) // what lives is gone through by then
		reached, answered := len(first.Peers()), client.first.Load()
		e.more("calls of the successor that is not there are refused", &client.failed, 20)
		if n := len(first.Peers()) - reached; n != 0 || client.first.Load() != answered {
			t.Errorf("%d connections for the successor reached the first, which gave %d answers", n, client.first.Load()-answered)
		}
	}

	// The first goes. Its successor's application is there before the daemon has
	// heard of it, where it has a namespace of its own.
	var next *lab.App
	entry := entryOf(e.Pod(2, 1))
	entry.Name, entry.ServiceAccount = account, account
	if moved {
		pod, err := e.Pod(2, 1).Succeed(account)
		e.must(err)
		next = e.named(pod, "other")
		entry = entryOf(pod)
	}
	e.setPods(d[1], entry, entryOf(e.Pod(2, 2)))
	if !moved {
		e.must(first.Close())
		next = e.named(e.Pod(2, 1), "other")
	}
	if !early {
		ended("the deleted pod's connection")
	}
	if !early {
		// The client's node still expects the first: it gives the second nothing.
		answered := client.first.Load()
		e.more("calls of the first are refused", &client.failed, 20)
		if n := client.first.Load() - answered; n != 0 {
			t.Errorf("the first, which is deleted, gave %d answers", n)
		}
		if n := len(next.Peers()); n != 0 || client.other.Load() != 0 {
			t.Errorf("%d connections for the first reached its successor, which gave %d answers", n, client.other.Load())
		}
		if n := e.sum(d[0], failures, "reason", "identity_mismatch", "reporter", "source"); n == 0 {
			t.Error("no mismatch of identities was seen")
		}
		e.setWorkloads(known, d...)
	} else {
		e.setWorkloads(known, d[1])
	}
	// The same client, which nobody touched, is served by the successor.
	e.more("the successor answers", &client.other, 50)
	client.end()
	if len(next.Peers()) == 0 {
		t.Error("control: the successor's application counts no connection")
	}
	want := "spiffe://" + lab.TrustDomain + "/ns/" + entry.Namespace + "/sa/" + account
	found, err := d[0].WaitAccessLog(e.ctx, 1, func(l lab.Entry) bool { return l.String("dst.identity") == want })
	if err != nil {
		t.Errorf("no connection is logged with %s: %v, %v", want, found, err)
	}
	// Nothing was taken in as the first since its successor is enrolled.
	enrolled := e.enrolledAt(d[1], account)
	lines, err := d[1].AccessLog()
	e.must(err)
	asFirst := 0
	for _, l := range lines {
		if l.String("direction") != "inbound" || l.String("dst.identity") != e.Pod(2, 1).Identity() {
			continue
		}
		asFirst++
		if start, err := time.Parse(time.RFC3339Nano, l.String("start")); err != nil || start.After(enrolled) {
			t.Errorf("taken in as the first at %s (%v), and its successor is enrolled since %s: %v", start, err, enrolled, l)
		}
	}
	if asFirst == 0 {
		t.Error("control: nothing is logged as taken in by the first")
	}
	t.Logf("answers: %d by the first, %d by its successor; %d calls failed", client.first.Load(), client.other.Load(), client.failed.Load())
}

// enrolledAt is when a daemon says that it has enrolled a pod.
func (e *env) enrolledAt(d *lab.Daemon, pod string) time.Time {
	e.t.Helper()
	b, err := os.ReadFile(d.LogFile)
	e.must(err)
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, `msg="pod enrolled"`) && strings.Contains(line, "_"+pod+" ") {
			at, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
			when, err := time.Parse(time.RFC3339Nano, at)
			e.must(err)
			return when
		}
	}
	e.t.Fatalf("the log does not say that %s is enrolled", pod)
	return time.Time{}
}
