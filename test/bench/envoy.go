// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// envoy is Envoy as Istio runs it in a pod: two workers, a TCP proxy each way to
// where the connection was going, a line of its access log for each connection.
type envoy struct{}

func (envoy) about(program string) string {
	_, version, _ := strings.Cut(firstLine(program, "--version"), "version: ") // commit/release/…
	if f := strings.Split(version, "/"); len(f) > 1 {
		version = f[1]
	}
	return "Envoy " + version + ", one in each pod, --concurrency 2"
}

type (
	object = map[string]any
	list   = []any
)

func (envoy) command(dir string, p *lab.Pod, c certificate, peers peers) ([]string, []uint16, error) {
	config := object{
		"node":  object{"id": p.Name, "cluster": "bench"},
		"admin": object{"address": object{"pipe": object{"path": filepath.Join(dir, "admin.sock")}}},
		"static_resources": object{
			"listeners": list{
				envoyListener("outbound", outboundPort, dir, nil),
				envoyListener("inbound", inboundPort, dir, object{
					"name": "tls", "typed_config": typed("transport_sockets.tls.v3.DownstreamTlsContext", object{
						"common_tls_context": envoyTLS(c, peers.clients), "require_client_certificate": true,
					}),
				}),
			},
			"clusters": list{
				envoyCluster("inbound", nil),
				envoyCluster("outbound", object{
					"name": "tls", "typed_config": typed("transport_sockets.tls.v3.UpstreamTlsContext", object{
						"common_tls_context": envoyTLS(c, peers.servers),
					}),
				}),
			},
		},
	}
	b, err := json.MarshalIndent(config, "", " ")
	if err != nil {
		return nil, nil, err
	}
	file := filepath.Join(dir, "envoy.json")
	return []string{"-c", file, "--concurrency", "2", "--disable-hot-restart", "--log-level", "warning"}, bothPorts, os.WriteFile(file, b, 0o600)
}

// typed is a message whose type Envoy has to be told.
func typed(name string, fields object) object {
	fields["@type"] = "type.googleapis.com/envoy.extensions." + name
	return fields
}

func envoyListener(name string, port uint16, dir string, socket object) object {
	chain := object{"filters": list{object{
		"name": "tcp", "typed_config": typed("filters.network.tcp_proxy.v3.TcpProxy", object{
			"stat_prefix": name, "cluster": name,
			"access_log": list{object{"name": "file", "typed_config": typed("access_loggers.file.v3.FileAccessLog", object{
				"path": filepath.Join(dir, "access.log"),
			})}},
		}),
	}}}
	if socket != nil {
		chain["transport_socket"] = socket
	}
	to := any4(port)
	return object{
		"name":    name,
		"address": object{"socket_address": object{"address": to.Addr(), "port_value": to.Port()}},
		"listener_filters": list{object{
			"name": "original_dst", "typed_config": typed("filters.listener.original_dst.v3.OriginalDst", object{}),
		}},
		"filter_chains": list{chain},
	}
}

// envoyCluster connects to where the connection was going.
func envoyCluster(name string, socket object) object {
	const many = 100000 // 1024 connections, by default
	c := object{
		"name": name, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "10s",
		"circuit_breakers": object{"thresholds": list{object{"max_connections": many, "max_pending_requests": many, "max_requests": many}}},
	}
	if socket != nil {
		c["transport_socket"] = socket
	}
	return c
}

// envoyTLS is what both ends have: 1.3 with our key exchange, a certificate, and
// the check of the peer's: its SPIFFE ID, signed by the trust domain's root.
func envoyTLS(c certificate, peers []*lab.Pod) object {
	names := list{}
	for _, p := range peers {
		names = append(names, object{"san_type": "URI", "matcher": object{"exact": p.Identity()}})
	}
	return object{
		"tls_params": object{
			"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3",
			"ecdh_curves": list{"X25519MLKEM768", "X25519"},
		},
		"tls_certificates": list{object{
			"certificate_chain": object{"filename": c.chain}, "private_key": object{"filename": c.key},
		}},
		"validation_context": object{
			"custom_validator_config": object{
				"name": "envoy.tls.cert_validator.spiffe",
				"typed_config": typed("transport_sockets.tls.v3.SPIFFECertValidatorConfig", object{
					"trust_domains": list{object{"name": lab.TrustDomain, "trust_bundle": object{"filename": c.root}}},
				}),
			},
			"match_typed_subject_alt_names": names,
		},
	}
}
