// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
)

// Watch is what a daemon writes from a moment on.
type Watch struct {
	d           *Daemon
	log, access int // bytes of its log and lines of its access log that there were before
}

// Watch begins a watch.
func (d *Daemon) Watch() (*Watch, error) {
	log, err := os.ReadFile(d.LogFile)
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	access, err := d.AccessLog()
	if err != nil {
		return nil, err
	}
	return &Watch{d: d, log: len(log), access: len(access)}, nil
}

// Log returns what the daemon has logged since.
func (w *Watch) Log() (string, error) {
	b, err := os.ReadFile(w.d.LogFile)
	if err != nil {
		return "", fmt.Errorf("read log: %w", err)
	}
	return string(b[w.log:]), nil
}

// AccessLog returns the lines that the access log has got since.
func (w *Watch) AccessLog() ([]Entry, error) {
	all, err := w.d.AccessLog()
	if err != nil {
		return nil, err
	}
	return all[w.access:], nil
}

// Closed waits for the access log's line of a connection to dst, outbound or inbound.
func (w *Watch) Closed(ctx context.Context, direction string, dst netip.AddrPort, hopeless ...func() error) (found Entry, err error) {
	err = Until(ctx, fmt.Sprintf("the access log of %s has the connection", w.d.Node.Name), func() error {
		lines, err := w.AccessLog()
		if err != nil {
			return err
		}
		for _, l := range lines {
			if l.String("direction") == direction && l.String("dst.addr") == dst.String() {
				found = l
				return nil
			}
		}
		return fmt.Errorf("%d lines, none of %s to %s", len(lines), direction, dst)
	}, hopeless...)
	return found, err
}

// HandshakeFailed waits for the log's line of a handshake that has failed.
func (w *Watch) HandshakeFailed(ctx context.Context, hopeless ...func() error) (line string, err error) {
	err = Until(ctx, fmt.Sprintf("the log of %s has a failed handshake", w.d.Node.Name), func() error {
		log, err := w.Log()
		if err != nil {
			return err
		}
		for l := range strings.Lines(log) {
			if strings.Contains(l, `msg="handshake failed"`) && strings.HasSuffix(l, "\n") { // else it is being written
				line = l
				return nil
			}
		}
		return errors.New("none has failed, by its log")
	}, hopeless...)
	return line, err
}
