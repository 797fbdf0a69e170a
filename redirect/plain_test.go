// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-mesh/culvert/redirect"
)

// inbound opens the listener of plaintext.
func (w *world) inbound(f family) int {
	w.t.Helper()
	slot := redirect.Inbound4
	if f.v6 {
		slot = redirect.Inbound6
	}
	fd, err := w.maker.Listen(w.pod, at(f.any, 15006), true)
	w.must(err)
	w.listeners[slot] = fd
	w.must(w.redirected.Listen(slot, fd))
	return fd
}

// takesPlain connects from outside to the pod's ports, and says on which the
// tunnel took plaintext; the others must have been refused.
func (w *world) takesPlain(f family, l int, ports ...uint16) (taken []uint16) {
	w.t.Helper()
	for _, port := range ports {
		fd, err := w.connect(w.outside, at(f.pod, port), nil)
		if err != nil {
			w.refused(at(f.pod, port).String(), func() error { _, err := w.connect(w.outside, at(f.pod, port), nil); return err })
			continue
		}
		c := w.accept(l)
		w.exchange(fd, c)
		if local(c) != at(f.pod, port) || peer(c) != local(fd) {
			w.t.Errorf("the tunnel sees %s and %s", peer(c), local(c))
		}
		taken = append(taken, port)
	}
	return taken
}

// Plaintext from outside goes to the tunnel's listener where the pod takes it,
// never to the application by itself, and never to the tunnel's own ports.
func TestPlainPorts(t *testing.T) {
	ports := []uint16{8080, 8081, 15001, 15006}
	both(t, func(w *world, f family) {
		w.start()
		app := w.listen(w.pod, at(f.any, 8080))
		// A port that takes plaintext, and nobody listens: refused.
		w.must(w.redirected.SetPlainPorts(redirect.PlainPorts{All: true}))
		n := w.counted(func() { w.takesPlain(f, -1, 8080) })
		if n["steer_dropped_no_listener"] == 0 {
			t.Errorf("counted %v", n)
		}
		l := w.inbound(f)
		for _, c := range []struct {
			set  redirect.PlainPorts
			want []uint16
		}{
			{redirect.PlainPorts{}, nil},
			{redirect.PlainPorts{Only: []uint16{8081, 15006}}, []uint16{8081}},
			{redirect.PlainPorts{All: true}, []uint16{8080, 8081}},
			{redirect.PlainPorts{All: true, Except: []uint16{8081}}, []uint16{8080}},
			{redirect.PlainPorts{Only: []uint16{8080}}, []uint16{8080}},
			{redirect.PlainPorts{All: true, Except: []uint16{8080}}, []uint16{8081}},
			{redirect.PlainPorts{}, nil},
		} {
			w.must(w.redirected.SetPlainPorts(c.set))
			var got []uint16
			n := w.counted(func() { got = w.takesPlain(f, l, ports...) })
			if !slices.Equal(got, c.want) {
				t.Errorf("%+v: plaintext is taken on %d, want %d", c.set, got, c.want)
			}
			if n["steer_plain"] != uint64(len(c.want)) || n["strict_refused"] != 2*uint64(len(ports)-len(c.want)) {
				t.Errorf("%+v: counted %v", c.set, n)
			}
		}
		// The pod's own calls are as before, and the tunnel's port is not for it.
		w.must(w.redirected.SetPlainPorts(redirect.PlainPorts{All: true}))
		fd, err := w.connect(w.pod, at(f.pod, 8080), nil)
		w.must(err)
		w.exchange(fd, w.accept(app))
		w.refused("the tunnel's port", func() error { _, err := w.connect(w.pod, at(f.loop, 15006), nil); return err })
		w.empty(app, l, w.listeners[f.outbound], w.listeners[f.hbone])
	})
}

// An undeclared address of the mesh's device takes none.
func TestPlainPortsAreOfMeshAddresses(t *testing.T) {
	both(t, func(w *world, f family) {
		extra := netip.MustParseAddr("10.99.0.101")
		if f.v6 {
			extra = netip.MustParseAddr("fd99::101")
		}
		w.in(w.pod, func() error { return addAddr("eth0", extra) })
		w.start()
		w.must(w.redirected.SetPlainPorts(redirect.PlainPorts{All: true}))
		l := w.inbound(f)
		if got := w.takesPlain(f, l, 8080); len(got) != 1 {
			t.Errorf("the mesh address takes plaintext on %d", got)
		}
		w.refused("an undeclared address", func() error { _, err := w.connect(w.outside, at(extra, 8080), nil); return err })
	})
}

// What was set outlives the process, until the successor says otherwise; a
// release takes it away.
func TestPlainPortsAreTakenOver(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		w.must(w.redirected.SetPlainPorts(redirect.PlainPorts{All: true, Except: []uint16{8081}}))
		w.must(w.stop())
		w.refused("without a daemon", func() error { _, err := w.connect(w.outside, at(f.pod, 8080), nil); return err })
		w.start()
		l := w.inbound(f)
		if got := w.takesPlain(f, l, 8080, 8081); !slices.Equal(got, []uint16{8080}) {
			t.Errorf("taken over: plaintext on %d", got)
		}
		// The successor knows what it found: what it does not want is removed.
		w.must(w.redirected.SetPlainPorts(redirect.PlainPorts{Only: []uint16{8081}}))
		if got := w.takesPlain(f, l, 8080, 8081); !slices.Equal(got, []uint16{8081}) {
			t.Errorf("after a change: plaintext on %d", got)
		}
		for _, again := range []func(*redirect.Pod) error{(*redirect.Pod).Release, (*redirect.Pod).Leave} {
			w.must(w.redirected.SetPlainPorts(redirect.PlainPorts{All: true}))
			w.must(again(w.redirected))
			w.must(w.stop())
			w.start()
			if got := w.takesPlain(f, w.inbound(f), 8080); got != nil {
				t.Errorf("a pod that came again takes plaintext on %d", got)
			}
		}
	})
}

// A full map is named, and then nothing takes plaintext that did not.
func TestPlainPortsAreBounded(t *testing.T) {
	w := newWorld(t)
	w.start()
	ports := make([]uint16, 65535)
	for i := range ports {
		ports[i] = uint16(i + 1)
	}
	// The bound is of the node: this one pod fits, if only just.
	w.must(w.redirected.SetPlainPorts(redirect.PlainPorts{All: true, Except: ports}))
	other, path := w.namespace("other")
	w.in(other, func() error { return addAddr("lo", pod4) })
	w.in(other, upLo)
	second, err := w.node.AddPod(t.Context(), redirect.PodConfig{Name: "default/other", NS: other, NetnsPath: path, Addrs: []netip.Addr{pod4}})
	w.must(err)
	err = second.SetPlainPorts(redirect.PlainPorts{Only: []uint16{8080}})
	if err == nil || !strings.Contains(err.Error(), "no more than 65536 ports") {
		t.Errorf("set in a full map: %v", err)
	}
	w.must(w.redirected.SetPlainPorts(redirect.PlainPorts{}))
	w.must(second.SetPlainPorts(redirect.PlainPorts{Only: []uint16{8080}}))
	w.must(second.Release())
}
