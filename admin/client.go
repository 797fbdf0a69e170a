// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

const (
	// answerWait bounds the wait for an answer: a daemon that is stopped in a
	// debugger says nothing.
	answerWait = 30 * time.Second
	// maxAnswer bounds what is read of one: 65,536 connections are some 40 MB.
	maxAnswer = 256 << 20
)

// ErrNoDaemon is Get's where nobody serves the socket.
var ErrNoDaemon = errors.New("no ztunnel answers")

// ErrOtherVersion is Get's where the daemon does not know what is asked for.
var ErrOtherVersion = errors.New("the ztunnel that runs is of a version that does not know this")

// Get asks the daemon behind a socket for a path, such as /status, and decodes its
// answer.
func Get(ctx context.Context, socket, path string, answer any) error {
	c := http.Client{Timeout: answerWait, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://admin"+path, nil)
	if err != nil {
		return fmt.Errorf("ask ztunnel: %w", err)
	}
	resp, err := c.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w at %s", ErrNoDaemon, socket)
	case err != nil:
		return fmt.Errorf("ask ztunnel at %s: %w", socket, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	switch {
	case err != nil:
		return fmt.Errorf("ask ztunnel at %s: read its answer: %w", socket, err)
	case resp.StatusCode == http.StatusNotFound:
		return fmt.Errorf("ask ztunnel at %s: %w", socket, ErrOtherVersion)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("ask ztunnel at %s: it answers %s: %s", socket, resp.Status, strings.TrimSpace(string(body)))
	}
	if err := json.Unmarshal(body, answer); err != nil {
		return fmt.Errorf("ask ztunnel at %s: understand its answer: %w", socket, err)
	}
	return nil
}
