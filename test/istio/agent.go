// SPDX-License-Identifier: Apache-2.0

// Package istio is what surrounds Istio's own ztunnel on a node of the lab, for
// tests and the bench: the agent that hands it pods, the rules that pods have from
// istio-cni, the file by which it knows the mesh, and its environment. The ztunnel
// is a binary of the caller's, who starts and ends it; its certificates are of
// testca's Istio.
package istio

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// Agent is what istio-cni is to a ztunnel: a socket by which that learns its
// pods, each by a message with the descriptor of its network namespace. Messages
// are those of istio.workload.zds (istio/ztunnel, proto/zds.proto), one a packet.
type Agent struct {
	path string
	done chan error

	listener *net.UnixListener
	ended    chan struct{}

	mu     sync.Mutex // guards what follows
	conn   *net.UnixConn
	closed bool
}

// Agent listens at a path for a ztunnel, and hands it some pods once it is there.
// The caller closes it.
func (m Mesh) Agent(path string, pods []*lab.Pod) (*Agent, error) {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	a := &Agent{path: path, done: make(chan error, 1), listener: l, ended: make(chan struct{})}
	var adds []addition
	for _, p := range pods {
		adds = append(adds, m.add(p))
	}
	go func() {
		defer close(a.ended)
		c, err := l.AcceptUnix()
		if err == nil {
			err = a.keep(c)
		}
		if err == nil {
			err = welcome(c, adds)
		}
		a.done <- err
	}()
	return a, nil
}

// Taken has nil once every pod has been acknowledged, else an error, once.
func (a *Agent) Taken() <-chan error { return a.done }

// keep has a connection live until Close: without it a ztunnel gives its pods up.
func (a *Agent) keep(c *net.UnixConn) error {
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
func (a *Agent) Close() error {
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

// addition is a message, with the namespace of the pod that it is about; -1: none.
type addition struct {
	message []byte
	netns   int
}

func (m Mesh) add(p *lab.Pod) addition {
	return addition{addWorkload(uid(p), p.Name, p.Namespace, m.account(p)), p.NS.FD()}
}

// welcome has a ztunnel that comes take some pods, and says that they are all.
func welcome(c *net.UnixConn, adds []addition) error {
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
			return fmt.Errorf("tell of a pod: %w", err)
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
