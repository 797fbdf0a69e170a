// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// haproxy is HAProxy with OpenSSL. It cannot look at a certificate's URI, so it
// checks the chain, and the peer's name by its DNS name (a client), or not at all
// (a server): less than the others.
type haproxy struct{}

func (haproxy) about(program string) string {
	version := firstLine(program, "-v")
	if i := strings.Index(version, " - "); i > 0 {
		version = version[:i]
	}
	return version + ", one in each pod, nbthread 2; checks no SPIFFE ID"
}

func (haproxy) command(dir string, p *lab.Pod, c certificate, peers peers) ([]string, []uint16, error) {
	verify := ""
	if len(peers.servers) == 1 {
		verify = "verifyhost " + peers.servers[0].Name
	}
	// As many connections as its descriptors are enough for: it computes that itself.
	config := fmt.Sprintf(`global
	nbthread 2
	log stdout format raw local0
	ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
	ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
	mode tcp
	log global
	option tcplog
	timeout connect 10s
	timeout client 1h
	timeout server 1h
# A server's address of 0.0.0.0 is where the connection was going.
listen outbound
	bind 0.0.0.0:%d
	server peer 0.0.0.0 ssl ssl-min-ver TLSv1.3 crt %s ca-file %s verify required %s
listen inbound
	bind 0.0.0.0:%d ssl ssl-min-ver TLSv1.3 crt %[2]s ca-file %[3]s verify required
	server application 0.0.0.0
`, outboundPort, c.both, c.root, verify, inboundPort)
	file := filepath.Join(dir, "haproxy.cfg")
	return []string{"-db", "-f", file}, bothPorts, os.WriteFile(file, []byte(config), 0o600)
}
