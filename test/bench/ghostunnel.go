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
	// REDIRECT sends what the pod opens to loopback, and what comes to it to its address.
	role, at, to, allow, met := "server", any4(inboundPort), netip.AddrPortFrom(loopback, port), "--allow-uri", peers.clients
	if len(peers.servers) > 0 {
		role, at, to = "client", netip.AddrPortFrom(loopback, outboundPort), netip.AddrPortFrom(peers.servers[0].V4, port)
		allow, met = "--verify-uri", peers.servers
	}
	args := []string{
		role, "--listen", at.String(), "--target", to.String(), "--cert", c.chain, "--key", c.key, "--cacert", c.root,
	}
	if role == "client" {
		args = append(args, "--override-server-name", met[0].Name) // it checks the name too
	}
	for _, m := range met {
		args = append(args, fmt.Sprintf("%s=%s", allow, m.Identity()))
	}
	return args, []uint16{at.Port()}, nil
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})
