// SPDX-License-Identifier: Apache-2.0

package socket

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/testns"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

func TestMarkedListenerIsTheOneThatAnswers(t *testing.T) {
	l := func(at string, mark uint32) sockdiag.Socket {
		return sockdiag.Socket{Local: netip.MustParseAddrPort(at), Mark: mark}
	}
	const dst4, dst6 = "10.0.0.1:80", "[fd00::1]:80"
	for name, tt := range map[string]struct {
		dst       string
		listeners []sockdiag.Socket
		want      string
	}{
		"none":                   {dst4, nil, ""},
		"without a mark":         {dst4, []sockdiag.Socket{l("0.0.0.0:80", 0)}, ""},
		"with ours":              {dst4, []sockdiag.Socket{l("0.0.0.0:80", carriedMark)}, ""},
		"with its own":           {dst4, []sockdiag.Socket{l("0.0.0.0:80", 7)}, "0.0.0.0:80"},
		"another port":           {dst4, []sockdiag.Socket{l("0.0.0.0:81", 7)}, ""},
		"another address":        {dst4, []sockdiag.Socket{l("127.0.0.1:80", 7)}, ""},
		"the other family":       {dst6, []sockdiag.Socket{l("0.0.0.0:80", 7)}, ""},
		"both families":          {dst4, []sockdiag.Socket{l("[::]:80", 7)}, "[::]:80"},
		"v6":                     {dst6, []sockdiag.Socket{l("[::]:80", 7)}, "[::]:80"},
		"the exact one is clean": {dst4, []sockdiag.Socket{l("10.0.0.1:80", 0), l("0.0.0.0:80", 7)}, ""},
		"the exact one is not":   {dst6, []sockdiag.Socket{l("[::]:80", 0), l(dst6, 7)}, dst6},
		"own family goes before": {dst4, []sockdiag.Socket{l("[::]:80", 7), l("0.0.0.0:80", 0)}, ""},
		"one of a group":         {dst4, []sockdiag.Socket{l("0.0.0.0:80", 0), l("0.0.0.0:80", 7), l("0.0.0.0:80", 0)}, "0.0.0.0:80"},
	} {
		got, found := marked(tt.listeners, netip.MustParseAddrPort(tt.dst))
		if found != (tt.want != "") || found && got.Local.String() != tt.want {
			t.Errorf("%s: %v, %v, want %q", name, got.Local, found, tt.want)
		}
	}
}

func TestMarkedListener(t *testing.T) {
	ns := testns.New(t)
	dst := netip.MustParseAddrPort("127.0.0.1:8080")
	err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Bind(fd, sockaddr(dst)); err != nil {
			return err
		}
		if err := unix.Listen(fd, 1); err != nil {
			return err
		}
		if _, found, err := MarkedListener(ns, dst); found || err != nil {
			t.Errorf("without a mark: %v, %v", found, err)
		}
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 7)
	})
	if err != nil {
		t.Fatal(err)
	}
	l, found, err := MarkedListener(ns, dst)
	if !found || err != nil || l.Mark != 7 || l.Cookie == 0 {
		t.Errorf("with a mark: %+v, %v, %v", l, found, err)
	}
}
