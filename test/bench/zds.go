// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// nodeAgent is what istio-cni is to a ztunnel: a socket by which that learns its
// pods, each by a message with the descriptor of its network namespace. Messages
// are those of istio.workload.zds (istio/ztunnel, proto/zds.proto), one a packet.
type nodeAgent struct {
	path string
	done chan error // nil once every pod has been acknowledged

	listener *net.UnixListener
	ended    chan struct{}

	mu     sync.Mutex // guards what follows
	conn   *net.UnixConn
	closed bool
}

func newNodeAgent(path string, pods []*lab.Pod) (*nodeAgent, error) {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	a := &nodeAgent{path: path, done: make(chan error, 1), listener: l, ended: make(chan struct{})}
	var adds []addition
	for _, p := range pods {
		adds = append(adds, addition{addWorkload(istioUID(p), p.Name, p.Namespace, p.ServiceAccount), p.NS.FD()})
	}
	go func() {
		defer close(a.ended)
		c, err := l.AcceptUnix()
		if err == nil {
			err = a.keep(c)
		}
		if err == nil {
			err = tell(c, adds)
		}
		a.done <- err
	}()
	return a, nil
}

// keep has a connection live until Close: without it a ztunnel gives its pods up.
func (a *nodeAgent) keep(c *net.UnixConn) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		c.Close()
		return net.ErrClosed
	}
	a.conn = c
	return nil
}

// Close ends the agent and its connection.
func (a *nodeAgent) Close() error {
	err := a.listener.Close()
	a.mu.Lock()
	a.closed = true
	if a.conn != nil {
		a.conn.Close()
	}
	a.mu.Unlock()
	<-a.ended
	return err
}

// addition is a pod that is told of.
type addition struct {
	message []byte
	netns   int
}

// tell has a ztunnel take some pods, and says that they are all.
func tell(c *net.UnixConn, adds []addition) error {
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	if _, err := c.Read(buf); err != nil { // its hello: a version
		return fmt.Errorf("read hello: %w", err)
	}
	const snapshotSent = 3
	for _, add := range append(adds, addition{field(snapshotSent, nil), -1}) {
		var rights []byte
		if add.netns >= 0 {
			rights = unix.UnixRights(add.netns)
		}
		if _, _, err := c.WriteMsgUnix(add.message, rights, nil); err != nil {
			return fmt.Errorf("send a pod: %w", err)
		}
		n, err := c.Read(buf)
		if err == nil {
			err = acknowledged(buf[:n])
		}
		if err != nil {
			return fmt.Errorf("await an acknowledgement: %w", err)
		}
	}
	return c.SetDeadline(time.Time{})
}

// field is a field of a protobuf message that has a length.
func field(number int, content []byte) []byte {
	const lengthDelimited = 2
	b := binary.AppendUvarint([]byte{byte(number<<3 | lengthDelimited)}, uint64(len(content)))
	return append(b, content...)
}

// addWorkload is WorkloadRequest.add.
func addWorkload(uid, name, namespace, serviceAccount string) []byte {
	info := append(append(field(1, []byte(name)), field(2, []byte(namespace))...), field(3, []byte(serviceAccount))...)
	return field(1, append(field(1, []byte(uid)), field(2, info)...))
}

// acknowledged reads WorkloadResponse.ack, whose only field is an error.
func acknowledged(message []byte) error {
	if len(message) < 2 || message[0] != field(1, nil)[0] {
		return fmt.Errorf("%x is no acknowledgement", message)
	}
	if len(message) > 2 {
		return fmt.Errorf("it answers: %q", message[2:])
	}
	return nil
}

// serveIstioCA has an authority answer in a node's namespace, and returns the file
// of the root by which it is known itself.
func (s *site) serveIstioCA(n *lab.Node) (root string, err error) {
	server, err := s.ca.Istio()
	if err != nil {
		return "", err
	}
	var l net.Listener
	err = n.Do(func() (err error) {
		l, err = net.Listen("tcp", istioCA)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("listen on %s: %w", n.Name, err)
	}
	go func() {
		if err := server.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
			fmt.Fprintln(os.Stderr, "bench: certificates for Istio's ztunnel:", err)
		}
	}()
	s.closers = append(s.closers, server)
	root = filepath.Join(n.Dir, "root.pem")
	return root, os.WriteFile(root, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.Root.Raw}), 0o600)
}
