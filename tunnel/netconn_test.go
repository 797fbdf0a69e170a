// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/testtcp"
)

// connected is a connection over loopback, with the second end a netConn.
func connected(t *testing.T) (*net.TCPConn, *netConn) {
	t.Helper()
	peer, c := testtcp.Pair(t)
	defer c.Close()
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	return peer, newNetConn(fd, netip.AddrPort{}, netip.AddrPort{})
}

// What a peer is told last arrives, though it has sent more than was read.
func TestPartIsHeard(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(*netConn)
		want error
	}{
		"part":                  {func(c *netConn) { c.part(context.Background()) }, nil},
		"control: closed alone": {func(c *netConn) { c.Close() }, unix.ECONNRESET},
	} {
		peer, c := connected(t)
		if _, err := io.WriteString(peer, strings.Repeat("x", 10000)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "alert"); err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { defer close(done); tt.end(c) }()
		_ = peer.SetReadDeadline(time.Now().Add(10 * time.Second))
		if b, err := io.ReadAll(peer); string(b) != "alert" || !errors.Is(err, tt.want) {
			t.Errorf("%s: the peer reads %q, %v, want %v", name, b, err, tt.want)
		}
		peer.Close()
		<-done
	}
}

// A peer that does not end is not listened to for ever, nor one that sends on.
func TestPartIsBounded(t *testing.T) {
	within := func(what string, f func()) {
		t.Helper()
		done := make(chan struct{})
		go func() { defer close(done); f() }()
		select {
		case <-done:
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: it does not end", what)
		}
	}
	_, c := connected(t)
	begin := time.Now()
	within("a silent peer", func() { c.part(context.Background()) })
	if took := time.Since(begin); took < lastWords/2 {
		t.Errorf("a silent peer had %v", took)
	}

	peer, c := connected(t)
	sent := make(chan int64)
	go func() {
		n, _ := io.Copy(peer, endless{})
		sent <- n
	}()
	within("a flood", func() { c.part(context.Background()) })
	select {
	case <-sent: // reset
	case <-time.After(30 * time.Second):
		t.Error("a flood goes on")
	}

	_, c = connected(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	begin = time.Now()
	within("the pod's end", func() { c.part(ctx) })
	if took := time.Since(begin); took > lastWords/2 {
		t.Errorf("the pod's end waits for %v", took)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }
