// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// callers is how many call the attacker's server at once.
const callers = 4

// helpers are what other processes do beside the attacker, in the pod that is
// attacked. They run until they are killed.
var helpers = map[string]func(order) error{
	"applications": func(o order) error {
		for address, handle := range map[string]func(*net.TCPConn){
			o.App:  func(c *net.TCPConn) { _, _ = io.Copy(c, c) },
			o.Deaf: deaf,
			o.Loud: loud,
		} {
			l, err := net.Listen("tcp", address)
			if err != nil {
				return err
			}
			if address == o.Deaf {
				// The kernel is to hold little of what it takes nothing of.
				if err := smallBuffer(l.(*net.TCPListener)); err != nil {
					return err
				}
			}
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						defer c.Close()
						handle(c.(*net.TCPConn))
					}()
				}
			}()
		}
		select {}
	},
	// callers call the attacker's server, again and again.
	"callers": func(o order) error {
		block, err := newAddresses(o.Block)
		if err != nil {
			return err
		}
		var all sync.WaitGroup
		for range callers {
			all.Go(func() {
				for range time.Tick(time.Millisecond) {
					ctx, cancel := context.WithTimeout(context.Background(), time.Second)
					to := o.Target
					if at := block.next(); at.IsValid() {
						to = netip.AddrPortFrom(at, 8080).String()
					}
					if c, err := new(net.Dialer).DialContext(ctx, "tcp", to); err == nil {
						_ = c.SetDeadline(time.Now().Add(time.Second))
						_, _ = c.Read(make([]byte, 1)) // a reset, or its first byte, and no more is taken
						_, _ = io.CopyN(io.Discard, &slow{c}, 1<<20)
						c.Close()
					}
					cancel()
				}
			})
		}
		all.Wait()
		return nil
	},
}

func smallBuffer(l *net.TCPListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<10) }); err != nil {
		return err
	}
	if failed != nil {
		return fmt.Errorf("set SO_RCVBUF: %w", failed)
	}
	return nil
}

// deaf takes nothing, until the tunnel ends the connection.
func deaf(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(func(fd uintptr) bool {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		return err != nil || info.State != unix.BPF_TCP_ESTABLISHED
	})
}

// loud says all that it can, in pieces that are no load of their own.
func loud(c *net.TCPConn) {
	_ = c.SetWriteBuffer(4 << 10)
	for p := make([]byte, 4096); ; {
		if _, err := c.Write(p); err != nil {
			return
		}
	}
}

// slow takes a byte, and waits for its end.
type slow struct{ net.Conn }

func (s *slow) Read(p []byte) (int, error) { return s.Conn.Read(p[:min(len(p), 1)]) }
