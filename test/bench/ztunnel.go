// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// istio is Istio's own ztunnel, one for all pods of a node, as it runs in ambient
// mode: a node agent hands it the pods' network namespaces, the pods have
// istio-cni's rules, and it knows the mesh by a file. Whoever changes this has to
// run it with a binary of theirs: none comes with the packages of any registry.
type istio struct{ binary string }

func (z istio) missing() string {
	if z.binary == "" {
		return "no Istio ztunnel here: name its binary by PEER_ZTUNNEL"
	}
	for _, p := range []string{z.binary, "iptables"} {
		if _, err := find(p); err != nil {
			return err.Error()
		}
	}
	return ""
}

func (z istio) about() string {
	return "Istio's ztunnel " + firstLine(z.binary, "version") + ", one on each node"
}

// istioCA is where the certificates' authority listens, in the node's namespace.
const istioCA = "127.0.0.1:15012"

func (z istio) carry(ctx context.Context, s *site, n *lab.Node, pods []*lab.Pod) error {
	program, err := find(z.binary)
	if err != nil {
		return err
	}
	root, err := s.serveIstioCA(n)
	if err != nil {
		return err
	}
	config := filepath.Join(n.Dir, "mesh.json")
	if err := os.WriteFile(config, istioMesh(s.lab.Pods()), 0o600); err != nil {
		return err
	}
	agent, err := newNodeAgent(filepath.Join(n.Dir, "zds.sock"), pods)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, agent)
	for _, p := range pods {
		if err := redirectIstio(p); err != nil {
			return err
		}
	}
	cmd := exec.Command(program, "proxy", "ztunnel")
	cmd.Dir = n.Dir
	cmd.Env = append(os.Environ(),
		"PROXY_MODE=shared", "INPOD_ENABLED=true", "INPOD_UDS="+agent.path, "NODE_NAME="+n.Name, "CLUSTER_ID=Kubernetes",
		"LOCAL_XDS_PATH="+config, "XDS_ADDRESS=", "FAKE_CA=false", "CA_ADDRESS=https://localhost:15012", "CA_ROOT_CA="+root,
		"ZTUNNEL_WORKER_THREADS=2",
	)
	proc, err := s.openAs(n, "istio", n.Start, cmd)
	if err != nil {
		return err
	}
	s.proxies = append(s.proxies, proxy{n, proc.PID()})
	const patience = 30 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case err = <-agent.done:
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

// istioMesh is what a ztunnel is told of the mesh, as JSON, which YAML is too.
func istioMesh(pods []*lab.Pod) []byte {
	workloads := list{}
	for _, p := range pods {
		workloads = append(workloads, object{
			"uid": istioUID(p), "name": p.Name, "namespace": p.Namespace, "serviceAccount": p.ServiceAccount,
			"trustDomain": lab.TrustDomain, "node": p.Node.Name, "workloadIps": p.Addrs(), "protocol": "HBONE",
			"network": "", "clusterId": "Kubernetes",
		})
	}
	b, err := json.Marshal(object{"workloads": workloads, "policies": list{}, "services": list{}})
	if err != nil {
		panic(err) // of strings and addresses
	}
	return b
}

func istioUID(p *lab.Pod) string { return "Kubernetes//Pod/" + p.Namespace + "/" + p.Name }

// The marks and the table of Istio's rules in a pod: its packets that ztunnel has
// sent, its connections that ztunnel has made, and the routes for the latter's
// answers.
const (
	istioMark      = "0x539/0xfff"
	istioConnMark  = 0x111
	istioMarkMask  = 0xfff
	istioTable     = 100
	istioRuleOrder = 32764
)

// redirectIstio gives a pod the rules that istio-cni gives it in ambient mode.
func redirectIstio(p *lab.Pod) error {
	ours := fmt.Sprintf("%#x/%#x", istioConnMark, istioMarkMask)
	loop := []string{"!", "-d", "127.0.0.1/32"}
	for _, rule := range []struct {
		table string
		rule  []string
	}{
		{"mangle", []string{"PREROUTING", "-m", "mark", "--mark", istioMark, "-j", "CONNMARK", "--set-xmark", ours}},
		{"mangle", []string{"OUTPUT", "-m", "connmark", "--mark", ours, "-j", "CONNMARK", "--restore-mark"}},
		{"nat", append([]string{"PREROUTING"}, append(loop, "-p", "tcp", "!", "--dport", "15008", "-m", "mark", "!", "--mark", istioMark, "-j", "REDIRECT", "--to-ports", "15006")...)},
		{"nat", []string{"OUTPUT", "-p", "tcp", "-m", "mark", "--mark", ours, "-j", "ACCEPT"}},
		{"nat", append([]string{"OUTPUT"}, append(loop, "-o", "lo", "-j", "ACCEPT")...)},
		{"nat", append([]string{"OUTPUT"}, append(loop, "-p", "tcp", "-m", "mark", "!", "--mark", istioMark, "-j", "REDIRECT", "--to-ports", "15001")...)},
	} {
		if err := iptables(p, rule.table, rule.rule...); err != nil {
			return err
		}
	}
	err := p.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		mask := uint32(istioMarkMask)
		rule := netlink.NewRule()
		rule.Family, rule.Mark, rule.Mask, rule.Table, rule.Priority = unix.AF_INET, istioConnMark, &mask, istioTable, istioRuleOrder
		if err := netlink.RuleAdd(rule); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{
			LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)},
			Scope: unix.RT_SCOPE_HOST, Type: unix.RTN_LOCAL, Table: istioTable,
		})
	})
	if err != nil {
		return fmt.Errorf("route in %s: %w", p.Name, err)
	}
	return nil
}
