// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// ghostunnel is a TCP proxy on Go's own TLS. It knows no original destination:
// its client connects to one port of one pod, and its server to one application,
// so there is one for each way, and each pod has the one that it needs.
type ghostunnel struct{}

func (ghostunnel) about(program string) string {
	return "ghostunnel " + firstLine(program, "--version") + ", one in each pod, to one fixed port"
}

func (ghostunnel) command(_ string, p *lab.Pod, c certificate, peers peers) ([]string, []uint16, error) {
	role, at, target, allow, met := "client", outboundPort, netip.AddrPort{}, "--verify-uri", peers.servers
	if len(peers.servers) > 0 {
		target = netip.AddrPortFrom(peers.servers[0].V4, port)
	} else {
		role, at, target, allow, met = "server", inboundPort, netip.AddrPortFrom(loopback, port), "--allow-uri", peers.clients
	}
	args := []string{
		role, "--listen", any4(uint16(at)).String(), "--target", target.String(),
		"--cert", c.chain, "--key", c.key, "--cacert", c.root, "--unsafe-listen", "--unsafe-target", "--disable-landlock",
	}
	for _, m := range met {
		args = append(args, fmt.Sprintf("%s=%s", allow, m.Identity()))
	}
	return args, []uint16{uint16(at)}, nil
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})
