// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"errors"
	"net/netip"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/redirect"
)

// ways are the options by which a socket's packets would take another way, of
// the calling thread's namespace.
var ways = map[string]func(fd int) error{
	"SO_MARK 0":        func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0) },
	"SO_MARK 0x77":     func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x77) },
	"SO_BINDTODEVICE":  bindToEth0,
	"SO_BINDTOIFINDEX": func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, 1) },
}

// tryWays tries each on a socket; all must end as want.
func (w *world) tryWays(what string, ns *netns.NS, fd int, want error) {
	w.t.Helper()
	for name, set := range ways {
		w.in(ns, func() error {
			if err := set(fd); !errors.Is(err, want) {
				w.t.Errorf("%s: %s: %v, want %v", what, name, err, want)
			}
			return nil
		})
	}
}

// Root in a pod may not take a connection off its way once it is carried, nor
// one that a delivery has made. All else goes through.
func TestCarriedStaysCarried(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		n := w.counted(func() {
			fd, err := w.connect(w.pod, at(f.remote, 8080), nil)
			w.must(err)
			c := w.accept(w.listeners[f.outbound])
			w.tryWays("carried", w.pod, fd, unix.EPERM)
			w.exchange(fd, c)
			// The tunnel's own end, which has the mark too.
			w.must(unix.SetsockoptInt(c, unix.SOL_SOCKET, unix.SO_MARK, 0x53a))
			w.tryWays("the tunnel's", w.pod, c, nil)

			stock := w.maker.Stock(w.pod)
			defer stock.Close()
			app := w.listen(w.pod, at(f.pod, 8080))
			d := w.take(stock, f.v6)
			w.must(deliver(d, f.remote, at(f.pod, 8080)))
			a := w.accept(app)
			w.tryWays("accepted", w.pod, a, unix.EPERM)
			w.must(limit(d))
			w.exchange(a, d)
		})
		if n["option_refused"] != uint64(2*len(ways)) {
			t.Errorf("counted %v", n)
		}
	})
}

// A dual-stack socket is carried by the other hook.
func TestCarriedStaysCarriedMapped(t *testing.T) {
	w := newWorld(t)
	w.start()
	fd, err := w.connect(w.pod, at(mapped(remote4), 8080), nil)
	w.must(err)
	w.tryWays("carried", w.pod, fd, unix.EPERM)
	w.exchange(fd, w.accept(w.listeners[redirect.Outbound4]))
}

// What is not carried is left alone, and so are all other options.
func TestOptionsPass(t *testing.T) {
	both(t, func(w *world, f family) {
		out := w.listen(w.outside, at(f.any, 8080))
		w.start()
		n := w.counted(func() {
			fd, err := w.connect(w.pod, at(f.outside, 8080), nil)
			w.must(err)
			w.tryWays("to outside the mesh", w.pod, fd, nil)
			// Our mark means nothing in a namespace that is not enrolled.
			c := w.accept(out)
			w.must(unix.SetsockoptInt(c, unix.SOL_SOCKET, unix.SO_MARK, 0x53a))
			w.tryWays("not enrolled", w.outside, c, nil)

			carried, err := w.connect(w.pod, at(f.remote, 8080), nil)
			w.must(err)
			w.exchange(carried, w.accept(w.listeners[f.outbound]))
			w.must(unix.SetsockoptInt(carried, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
			w.must(unix.SetsockoptInt(carried, unix.SOL_SOCKET, unix.SO_PRIORITY, 3))
			// Longer than the page that a program is shown.
			long := make([]byte, 3*4096)
			long[1] = 0x40 // 16 KiB, in little-endian
			w.must(unix.SetsockoptString(carried, unix.SOL_SOCKET, unix.SO_RCVBUF, string(long)))
			if got, err := unix.GetsockoptInt(carried, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil || got != 2*0x4000 {
				t.Errorf("SO_RCVBUF is %d, %v", got, err)
			}
		})
		if n["option_refused"] != 0 {
			t.Errorf("counted %v", n)
		}
		// A socket that is disconnected is judged anew at its next connect().
		fd, err := w.connect(w.pod, at(f.remote, 8080), nil)
		w.must(err)
		w.must(disconnect(fd, &unix.RawSockaddrInet4{}))
		w.must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x77))
		w.must(finish(fd, unix.Connect(fd, sockaddr(at(f.remote, 8080)))))
		w.tryWays("carried again", w.pod, fd, unix.EPERM)
	})
}

// The control: without the program, the same calls go through.
func TestCarriedEscapesWithoutTheHook(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		w.detach("setsockopt")
		fd, err := w.connect(w.pod, at(f.remote, 8080), nil)
		w.must(err)
		w.tryWays("carried", w.pod, fd, nil)
	})
}

// BenchmarkSetsockopt is what the hook costs those who do not concern it: run as
// root, once each way.
func BenchmarkSetsockopt(b *testing.B) {
	for _, hooked := range []bool{false, true} {
		name := map[bool]string{false: "without", true: "with"}[hooked]
		b.Run(name, func(b *testing.B) {
			if hooked {
				cfg := redirect.Config{RunDir: filepath.Join(b.TempDir(), "run")}
				node, err := redirect.Open(cfg)
				if err != nil {
					b.Fatal(err)
				}
				defer func() {
					if err := node.Close(); err != nil {
						b.Error(err)
					}
					if _, err := redirect.Cleanup(cfg); err != nil {
						b.Error(err)
					}
				}()
			}
			fd, err := tcp(false)
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Close(fd)
			for b.Loop() {
				unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
			}
		})
	}
}

// sendto() with MSG_FASTOPEN connects by itself: the hooks see that too.
func TestFastOpenBySendto(t *testing.T) {
	both(t, func(w *world, f family) {
		w.start()
		w.must(w.node.SetMeshCIDRs(append(prefixes("10.98.0.0/16"), prefixes("fd98::/16")...)))
		call := func(dst netip.AddrPort) (fd int, err error) {
			w.in(w.pod, func() (serr error) {
				if fd, serr = tcp(f.v6); serr != nil {
					return serr
				}
				err = unix.Sendto(fd, []byte("word"), unix.MSG_FASTOPEN, sockaddr(dst))
				return nil
			})
			w.closing(fd)
			return fd, err
		}
		n := w.counted(func() {
			fd, err := call(at(f.remote, 8080))
			w.must(err)
			c := w.accept(w.listeners[f.outbound])
			buf := make([]byte, 8)
			if n, err := unix.Read(c, buf); err != nil || string(buf[:n]) != "word" || local(c) != at(f.remote, 8080) {
				t.Errorf("the tunnel reads %q, %v of a connection to %s", buf[:max(n, 0)], err, local(c))
			}
			w.tryWays("carried", w.pod, fd, unix.EPERM)
			if _, err := call(at(f.remote.Next(), 8080)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("to an unknown address: %v", err)
			}
		})
		if n["connect_carried"] != 1 || n["connect_refused_unknown"] != 1 {
			t.Errorf("counted %v", n)
		}
	})
}
