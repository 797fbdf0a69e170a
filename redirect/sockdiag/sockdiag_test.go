// SPDX-License-Identifier: Apache-2.0

package sockdiag

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/internal/testns"
)

const mark = 0x53a

func in(t *testing.T, ns *netns.NS, f func() error) {
	t.Helper()
	if err := ns.Do(f); err != nil {
		t.Fatal(err)
	}
}

// pair makes a connection in the namespace: the client's descriptor, and the
// accepted one.
func pair(t *testing.T, ns *netns.NS, dst unix.Sockaddr, v6 bool, before func(fd int) error) (client, server int) {
	t.Helper()
	in(t, ns, func() error {
		l, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(l) })
		if err := errors.Join(unix.Bind(l, &unix.SockaddrInet6{}), unix.Listen(l, 8)); err != nil {
			return err
		}
		at, err := unix.Getsockname(l)
		if err != nil {
			return err
		}
		port := at.(*unix.SockaddrInet6).Port
		family := unix.AF_INET
		if v6 {
			family = unix.AF_INET6
		}
		switch d := dst.(type) {
		case *unix.SockaddrInet4:
			d.Port = port
		case *unix.SockaddrInet6:
			d.Port = port
		}
		if client, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if before != nil {
			if err := before(client); err != nil {
				return err
			}
		}
		if err := unix.Connect(client, dst); err != nil {
			return err
		}
		server, _, err = unix.Accept(l)
		return err
	})
	t.Cleanup(func() { unix.Close(client); unix.Close(server) })
	return client, server
}

func inode(t *testing.T, fd int) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return uint32(st.Ino)
}

func find(all []Socket, inode uint32) (Socket, bool) {
	i := slices.IndexFunc(all, func(s Socket) bool { return s.Inode == inode })
	if i < 0 {
		return Socket{}, false
	}
	return all[i], true
}

var loopbacks = map[string]struct {
	dst  unix.Sockaddr
	v6   bool
	addr string
}{
	"v4":         {&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, false, "127.0.0.1"},
	"v6":         {&unix.SockaddrInet6{Addr: [16]byte{15: 1}}, true, "::1"},
	"dual stack": {&unix.SockaddrInet6{Addr: [16]byte{10: 0xff, 11: 0xff, 12: 127, 15: 1}}, true, "127.0.0.1"},
}

func TestList(t *testing.T) {
	for name, tt := range loopbacks {
		t.Run(name, func(t *testing.T) {
			ns := testns.New(t)
			client, server := pair(t, ns, tt.dst, tt.v6, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark) })
			all, err := List(ns, Connected)
			if err != nil {
				t.Fatal(err)
			}
			if len(all) != 2 {
				t.Errorf("%d sockets are listed, want 2: %v", len(all), all)
			}
			c, ok := find(all, inode(t, client))
			s, sok := find(all, inode(t, server))
			if !ok || !sok {
				t.Fatalf("not listed: %v", all)
			}
			cookie, err := unix.GetsockoptUint64(client, unix.SOL_SOCKET, unix.SO_COOKIE)
			if err != nil {
				t.Fatal(err)
			}
			want := netip.MustParseAddr(tt.addr)
			if c.Local.Addr() != want || c.Remote.Addr() != want || c.Local != s.Remote || c.Remote != s.Local {
				t.Errorf("client %s - %s, server %s - %s", c.Local, c.Remote, s.Local, s.Remote)
			}
			if c.Mark != mark || s.Mark != 0 {
				t.Errorf("marks %#x and %#x", c.Mark, s.Mark)
			}
			if c.State != unix.BPF_TCP_ESTABLISHED || c.Cookie != cookie || c.UID != 0 {
				t.Errorf("state %d, cookie %d (want %d), uid %d", c.State, c.Cookie, cookie, c.UID)
			}
			listening, err := List(ns, Listening)
			if err != nil {
				t.Fatal(err)
			}
			if len(listening) != 1 || listening[0].Local.Port() != c.Remote.Port() || listening[0].State != unix.BPF_TCP_LISTEN {
				t.Errorf("listening: %v", listening)
			}
			if other, err := List(testns.New(t), Connected|Listening); err != nil || len(other) != 0 {
				t.Errorf("another namespace: %v, %v", other, err)
			}
		})
	}
}

// A dump of many messages is read whole.
func TestListOfMany(t *testing.T) {
	const n = 3000
	ns := testns.New(t)
	var addr netip.AddrPort
	in(t, ns, func() error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		addr = netip.MustParseAddrPort(l.Addr().String())
		for range n {
			c, err := net.Dial("tcp", addr.String())
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
		}
		return nil
	})
	all, err := List(ns, Connected)
	if err != nil {
		t.Fatal(err)
	}
	clients := map[netip.AddrPort]bool{}
	for _, s := range all {
		if s.Remote == addr {
			clients[s.Local] = true
		}
	}
	if len(clients) != n {
		t.Errorf("%d clients are listed, want %d", len(clients), n)
	}
}

// storage makes a map of the kind that marks the tunnel's sockets.
func storage(t *testing.T) *ebpf.Map {
	t.Helper()
	number := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SkStorage, Flags: unix.BPF_F_NO_PREALLOC | unix.BPF_F_CLONE, KeySize: 4, ValueSize: 4, Key: number, Value: number})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func TestStorage(t *testing.T) {
	ns := testns.New(t)
	ours, other := storage(t), storage(t)
	client, server := pair(t, ns, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}, true, nil)
	if err := errors.Join(ours.Put(uint32(client), uint32(1)), other.Put(uint32(server), uint32(1))); err != nil {
		t.Fatal(err)
	}
	got := map[uint32]bool{}
	if err := Each(ns, Query{States: Connected, Storage: ours.FD()}, func(s Socket) error { got[s.Inode] = s.Stored; return nil }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || !got[inode(t, client)] || got[inode(t, server)] {
		t.Errorf("stored: %v, want the client's only", got)
	}
	stop := errors.New("enough")
	if err := Each(ns, Query{States: Connected}, func(Socket) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("stopped with %v", err)
	}
}

func TestDestroy(t *testing.T) {
	for name, tt := range loopbacks {
		t.Run(name, func(t *testing.T) {
			ns := testns.New(t)
			client, server := pair(t, ns, tt.dst, tt.v6, nil)
			kept, keptServer := pair(t, ns, tt.dst, tt.v6, nil)
			all, err := List(ns, Connected)
			if err != nil {
				t.Fatal(err)
			}
			s, ok := find(all, inode(t, client))
			if !ok {
				t.Fatalf("not listed: %v", all)
			}
			another := s
			another.Cookie++
			if err := Destroy(ns, another); err != nil {
				t.Errorf("another of the same addresses: %v", err)
			}
			if _, err := unix.Write(client, []byte("x")); err != nil {
				t.Errorf("the wrong one was ended: %v", err)
			}
			if err := Destroy(ns, s); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 1)
			if _, err := unix.Read(client, b); !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("the process reads: %v", err)
			}
			if _, err := unix.Read(server, b); err == nil {
				_, err = unix.Read(server, b)
				if !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the peer reads: %v", err)
				}
			} else if !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the peer reads: %v", err)
			}
			if err := Destroy(ns, s); err != nil {
				t.Errorf("again: %v", err)
			}
			if _, err := unix.Write(kept, []byte("x")); err != nil {
				t.Errorf("the other one: %v", err)
			}
			if n, err := unix.Read(keptServer, b); n != 1 || err != nil {
				t.Errorf("the other one: %d, %v", n, err)
			}
		})
	}
}

func TestParseRefusesWhatIsCutShort(t *testing.T) {
	whole := make([]byte, sizeofMessage)
	whole[0] = unix.AF_INET
	whole = appendAttr(whole, attrMark, binary.NativeEndian.AppendUint32(nil, mark))
	if s, err := parse(whole); err != nil || s.Mark != mark {
		t.Errorf("whole: %v, %v", s, err)
	}
	for n := range sizeofMessage {
		if _, err := parse(whole[:n]); err == nil {
			t.Errorf("%d bytes are taken", n)
		}
	}
	if _, err := parse(whole[:len(whole)-2]); err == nil {
		t.Error("half an attribute is taken")
	}
	whole[sizeofMessage] = 1
	if _, err := parse(whole); err == nil {
		t.Error("an attribute shorter than its header is taken")
	}
}
