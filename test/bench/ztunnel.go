// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/test/istio"
)

// ambient is Istio's own ztunnel, one for all pods of a node, as it runs in ambient
// mode: a node agent hands it the pods' network namespaces, the pods have
// istio-cni's rules, and it knows the mesh by a file. Whoever changes this has to
// run it with a binary of theirs: none comes with the packages of any registry.
type ambient struct{ binary string }

func (z ambient) missing() string {
	if z.binary == "" {
		return "no Istio ztunnel here: name its binary by PEER_ZTUNNEL"
	}
	for _, p := range []string{z.binary, "iptables", "ip6tables"} {
		if _, err := find(p); err != nil {
			return err.Error()
		}
	}
	return ""
}

func (z ambient) about() string {
	return "Istio's ztunnel " + firstLine(z.binary, "version") + ", one on each node"
}

// istioCA is where the certificates' authority listens, in the node's namespace.
const istioCA = "127.0.0.1:15012"

func (z ambient) carry(ctx context.Context, s *site, n *lab.Node, pods []*lab.Pod) error {
	program, err := find(z.binary)
	if err != nil {
		return err
	}
	root, err := s.serveIstioCA(n)
	if err != nil {
		return err
	}
	mesh := istio.Mesh{Pods: s.lab.Pods()}
	config := filepath.Join(n.Dir, "mesh.json")
	if err := os.WriteFile(config, mesh.JSON(), 0o600); err != nil {
		return err
	}
	agent, err := mesh.Agent(filepath.Join(n.Dir, "zds.sock"), pods)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, agent)
	for _, p := range pods {
		if err := istio.Redirect(p); err != nil {
			return err
		}
	}
	cmd := exec.Command(program, "proxy", "ztunnel")
	cmd.Dir = n.Dir
	cmd.Env = append(os.Environ(), append(agent.Environment(n, config), "CA_ADDRESS=https://localhost:15012", "CA_ROOT_CA="+root, "ZTUNNEL_WORKER_THREADS=2")...)
	proc, err := s.openAs(n, "istio", n.Start, cmd)
	if err != nil {
		return err
	}
	s.proxies = append(s.proxies, proxy{n, proc.PID()})
	const patience = 30 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case err = <-agent.Taken():
	case <-proc.Done():
		err = proc.Ended()
	case <-ctx.Done():
		err = fmt.Errorf("it does not take its pods: %w", context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("start Istio's ztunnel on %s: %w\n%s", n.Name, err, tail(n, "istio"))
	}
	return nil
}

// serveIstioCA has an authority answer in a node's namespace, and returns the file
// of the root by which it is known itself.
func (s *site) serveIstioCA(n *lab.Node) (root string, err error) {
	server, err := s.ca.Istio(nil)
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
