// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
	"github.com/culvert-mesh/culvert/internal/testca"
)

// Where a pod's sidecar listens, as Istio's do: for what the pod opens, and for
// what comes to it.
const (
	outboundPort = 15001
	inboundPort  = 15006
)

var bothPorts = []uint16{outboundPort, inboundPort}

// sidecarGroup is the group that sidecars run in: the pod's rules let its
// connections pass. Istio has this number.
const sidecarGroup = 1337

// sidecar is a proxy in each pod, to which the pod's connections are redirected,
// both ways, and which talks mutual TLS to other pods' sidecars: a TLS connection
// for each of the application's.
type sidecar struct {
	program string
	kind    kind
}

// kind is what is particular to a program.
type kind interface {
	about(program string) string
	// command makes the configuration of a pod's sidecar in a folder, and returns
	// the command's arguments and where it will listen.
	command(dir string, p *lab.Pod, c certificate, peers peers) (args []string, ports []uint16, err error)
}

// peers are the pods whose identities a pod's sidecar is to meet.
type peers struct {
	servers []*lab.Pod // that it connects to
	clients []*lab.Pod // that connect to it
}

// certificate is an SVID in files, as sidecars read them.
type certificate struct {
	chain, key, root string
	both             string // chain and key in one
}

func (k sidecar) missing() string {
	if _, err := find(k.program); err != nil {
		return err.Error()
	}
	if _, err := find("iptables"); err != nil {
		return fmt.Sprintf("sidecars are redirected to by iptables: install the package iptables (%v)", err)
	}
	return ""
}

func (k sidecar) about() string { return k.kind.about(k.program) }

func (k sidecar) carry(ctx context.Context, s *site, n *lab.Node, pods []*lab.Pod) error {
	program, err := find(k.program)
	if err != nil {
		return err
	}
	for _, p := range pods {
		dir := filepath.Join(n.Dir, p.Name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		c, err := s.certify(dir, p)
		if err != nil {
			return err
		}
		args, ports, err := k.kind.command(dir, p, c, s.peers(p))
		if err != nil {
			return err
		}
		cmd := exec.Command(program, args...)
		cmd.Dir = dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Gid: sidecarGroup}}
		proc, err := s.open(p, cmd)
		if err != nil {
			return err
		}
		s.proxies = append(s.proxies, proxy{n, proc.PID()})
		if err := s.listens(ctx, p, proc, ports...); err != nil {
			return err
		}
		if err := redirect(p); err != nil {
			return err
		}
	}
	return nil
}

// peers: the pods of node 1 connect to the first one of node 2.
func (s *site) peers(p *lab.Pod) peers {
	if p == s.server {
		return peers{clients: s.lab.Nodes[0].Pods}
	}
	return peers{servers: []*lab.Pod{s.server}}
}

// certify writes a pod's SVID into a folder. It has the pod's name as a DNS name
// too, for a program that cannot look at a URI.
func (s *site) certify(dir string, p *lab.Pod) (certificate, error) {
	var c certificate
	id, err := spiffeid.FromString(p.Identity())
	if err != nil {
		return c, err
	}
	svid, err := s.ca.SVID(id, testca.ValidFor(24*time.Hour), testca.Change(func(t *x509.Certificate) { t.DNSNames = []string{p.Name} }))
	if err != nil {
		return c, err
	}
	chain, key, err := (&x509svid.SVID{Certificates: svid.Certificates, PrivateKey: svid.Key}).Marshal()
	if err != nil {
		return c, err
	}
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.Root.Raw})
	c = certificate{filepath.Join(dir, "chain.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "root.pem"), filepath.Join(dir, "both.pem")}
	for name, content := range map[string][]byte{c.chain: chain, c.key: key, c.root: root, c.both: append(chain, key...)} {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			return c, err
		}
	}
	return c, nil
}

// listens waits until a process listens on some ports of a pod. It does not
// connect: a transparent proxy would connect to itself.
func (s *site) listens(ctx context.Context, p *lab.Pod, proc *lab.Process, ports ...uint16) error {
	const patience = 60 * time.Second // a hundred may start at once
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := lab.Until(ctx, fmt.Sprintf("a proxy listens in %s", p.Name), func() error {
		var all []*netlink.Socket
		err := p.Do(func() error {
			for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
				some, err := netlink.SocketDiagTCP(family)
				if err != nil {
					return err
				}
				all = append(all, some...)
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, port := range ports {
			if !slices.ContainsFunc(all, func(s *netlink.Socket) bool { return s.State == netlink.TCP_LISTEN && s.ID.SourcePort == port }) {
				return fmt.Errorf("nothing listens on port %d", port)
			}
		}
		return nil
	}, proc.Ended)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, tail(p.Node, p.Name))
	}
	return nil
}

// redirect gives a pod the rules that Istio gives it: all that it opens to
// others, and all that comes to it, goes to the sidecar.
func redirect(p *lab.Pod) error {
	group := fmt.Sprint(sidecarGroup)
	for _, rule := range [][]string{
		{"OUTPUT", "-o", "lo", "-j", "RETURN"},
		{"OUTPUT", "-p", "tcp", "-m", "owner", "--gid-owner", group, "-j", "RETURN"},
		{"OUTPUT", "-p", "tcp", "-j", "REDIRECT", "--to-ports", fmt.Sprint(outboundPort)},
		{"PREROUTING", "-p", "tcp", "-j", "REDIRECT", "--to-ports", fmt.Sprint(inboundPort)},
	} {
		if err := iptables(p, "nat", rule...); err != nil {
			return err
		}
	}
	return nil
}

// iptables adds a rule to a table of a pod.
func iptables(p *lab.Pod, table string, rule ...string) error {
	args := append([]string{"-w", "-t", table, "-A"}, rule...)
	var out []byte
	err := p.Do(func() (err error) {
		out, err = exec.Command("iptables", args...).CombinedOutput()
		return err
	})
	if err != nil {
		return fmt.Errorf("redirect %s: iptables %s: %w: %s", p.Name, strings.Join(args, " "), err, out)
	}
	return nil
}

// any4 is every IPv4 address of a pod.
func any4(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.IPv4Unspecified(), port) }
