// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
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

// Get asks the daemon behind a socket for a path, such as /status, and decodes its
// answer, JSON; a *[]byte gets it as it is.
func Get(ctx context.Context, socket, path string, answer any) error {
	return ask(ctx, socket, http.MethodGet, path, nil, answer)
}

// Post tells it something, as JSON.
func Post(ctx context.Context, socket, path string, what, answer any) error {
	body, err := json.Marshal(what)
	if err != nil {
		return fmt.Errorf("tell ztunnel: %w", err)
	}
	return ask(ctx, socket, http.MethodPost, path, body, answer)
}

func ask(ctx context.Context, socket, method, path string, what []byte, answer any) error {
	c := http.Client{Timeout: answerWait, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://admin"+path, bytes.NewReader(what))
	if err != nil {
		return fmt.Errorf("ask ztunnel: %w", err)
	}
	resp, err := c.Do(req)
	var late net.Error
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w at %s", ErrNoDaemon, socket)
	case errors.As(err, &late) && late.Timeout():
		return fmt.Errorf("ask ztunnel at %s: no answer within %s: it is stopped, or the node is out of CPU", socket, answerWait)
	case err != nil:
		return fmt.Errorf("ask ztunnel at %s: %w", socket, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("ask ztunnel at %s: read its answer: %w", socket, err)
	case len(body) > maxAnswer:
		return fmt.Errorf("ask ztunnel at %s: its answer is longer than %d MiB", socket, maxAnswer>>20)
	case resp.StatusCode == http.StatusNotFound, resp.StatusCode == http.StatusMethodNotAllowed:
		return fmt.Errorf("ask ztunnel at %s: the ztunnel that runs is of a version that does not know this", socket)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("ask ztunnel at %s: it answers %s: %s", socket, resp.Status, strings.TrimSpace(string(body)))
	}
	if raw, ok := answer.(*[]byte); ok {
		*raw = body
		return nil
	}
	if err := json.Unmarshal(body, answer); err != nil {
		return fmt.Errorf("ask ztunnel at %s: understand its answer: %w", socket, err)
	}
	return nil
}
