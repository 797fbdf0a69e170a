// SPDX-License-Identifier: Apache-2.0

// Package admin serves the daemon's unix socket: HTTP for those who may read a
// file of mode 0600, so root. It imports no part of the data plane; parts are
// mounted on it as handlers, beside Go's profiler.
package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Server is the socket and who serves it.
type Server struct {
	http *http.Server
	done chan error
}

// Mount is a handler and where it is found, a pattern of http.ServeMux.
type Mount struct {
	Pattern string
	Handler http.Handler
}

// Socket is the path of the socket of a daemon with this run directory.
func Socket(runDir string) string { return filepath.Join(runDir, "admin.sock") }

// Listen makes the socket at path, in place of one that a killed daemon has
// left, and serves it until Close. Who calls it holds the run directory's lock.
func Listen(ctx context.Context, path string, mounts ...Mount) (*Server, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("make admin socket: %w", err)
	}
	// The mask is the process's; nothing else makes files while a daemon
	// starts.
	mask := syscall.Umask(0o177)
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	syscall.Umask(mask)
	if err != nil {
		return nil, fmt.Errorf("make admin socket: %w", err)
	}
	mux := http.NewServeMux()
	for _, m := range mounts {
		mux.Handle(m.Pattern, m.Handler)
	}
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	s := &Server{
		http: &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 16 << 10},
		done: make(chan error, 1),
	}
	go func() { s.done <- s.http.Serve(l) }()
	return s, nil
}

// Close closes the socket, removes it, and waits for its server.
func (s *Server) Close() error {
	err := s.http.Close()
	if serr := <-s.done; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}
