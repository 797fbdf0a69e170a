// SPDX-License-Identifier: Apache-2.0

package peers

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// Envoy reads its configuration as JSON; these make the parts that both roles
// have.

type (
	object = map[string]any
	list   = []any
)

// typed is a message whose type Envoy has to be told.
func typed(name string, fields object) object {
	fields["@type"] = "type.googleapis.com/envoy.extensions." + name
	return fields
}

func socketAddress(a netip.AddrPort) object {
	return object{"socket_address": object{"address": a.Addr().String(), "port_value": a.Port(), "ipv4_compat": a.Addr() == netip.IPv6Unspecified()}}
}

// envoyTLS is what both ends of Envoy's TLS have: 1.3 with ALPN h2, its own
// certificate, and its own check of SPIFFE certificates. identities are those
// that it expects; none: anybody of the trust domain.
func envoyTLS(f files, identities ...string) object {
	var names list
	for _, id := range identities {
		names = append(names, object{"san_type": "URI", "matcher": object{"exact": id}})
	}
	validation := object{"custom_validator_config": object{
		"name": "envoy.tls.cert_validator.spiffe",
		"typed_config": typed("transport_sockets.tls.v3.SPIFFECertValidatorConfig", object{
			"trust_domains": list{object{"name": lab.TrustDomain, "trust_bundle": object{"filename": f.Root}}},
		}),
	}}
	if names != nil {
		validation["match_typed_subject_alt_names"] = names
	}
	return object{
		"tls_params":     object{"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
		"alpn_protocols": list{"h2"},
		"tls_certificate_sds_secret_configs": list{object{
			"name": "own", "sds_config": object{"path_config_source": object{"path": secret(f)}},
		}},
		"validation_context": validation,
	}
}

// secret is the file by which Envoy learns a certificate, and notices that it is
// another by now.
func secret(f files) string { return f.Cert + ".json" }

// writeSecret writes it.
func writeSecret(e *env, f files) {
	e.t.Helper()
	inline := func(path string) object {
		b, err := os.ReadFile(path)
		e.must(err)
		return object{"inline_string": string(b)}
	}
	b, err := json.Marshal(object{"resources": list{object{
		"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "name": "own",
		"tls_certificate": object{"certificate_chain": inline(f.Cert), "private_key": inline(f.Key)},
	}}})
	e.must(err)
	e.must(os.WriteFile(secret(f)+".new", b, 0o600))
	e.must(os.Rename(secret(f)+".new", secret(f)))
}

func transportSocket(context string, fields object) object {
	return object{"name": "tls", "typed_config": typed("transport_sockets.tls.v3."+context, fields)}
}

// accessLog is a file of lines of JSON with these fields.
func accessLog(path string, fields object) list {
	return list{object{
		"name":         "file",
		"typed_config": typed("access_loggers.file.v3.FileAccessLog", object{"path": path, "log_format": object{"json_format": fields}}),
	}}
}

// cluster is a group of one address.
func cluster(name string, to netip.AddrPort, more object) object {
	c := object{
		"name": name, "type": "STATIC", "connect_timeout": "5s",
		"load_assignment": object{"cluster_name": name, "endpoints": list{object{
			"lb_endpoints": list{object{"endpoint": object{"address": socketAddress(to)}}},
		}}},
		"circuit_breakers": object{"thresholds": list{object{"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}}},
	}
	for k, v := range more {
		c[k] = v
	}
	return c
}

// tunnelled is a listener in the pod whose connections leave as CONNECT to an
// authority, over a cluster.
func tunnelled(r route, port uint16, log string) object {
	return object{
		"name":    r.name,
		"address": socketAddress(netip.AddrPortFrom(loopback, port)),
		"filter_chains": list{object{"filters": list{object{
			"name": "tcp",
			"typed_config": typed("filters.network.tcp_proxy.v3.TcpProxy", object{
				"stat_prefix": r.name, "cluster": r.cluster,
				"tunneling_config": object{"hostname": r.authority, "propagate_response_headers": true},
				"access_log": accessLog(log, object{
					"route": r.name, "flags": "%RESPONSE_FLAGS%", "tls": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
					"answer": "%FILTER_STATE(envoy.tcp_proxy.propagate_response_headers:TYPED)%",
				}),
			}),
		}}}},
	}
}

// overTunnel makes a cluster one of HTTP/2 over mutual TLS.
func overTunnel(f files, expect string) object {
	return object{
		"transport_socket": transportSocket("UpstreamTlsContext", object{"common_tls_context": envoyTLS(f, expect)}),
		"typed_extension_protocol_options": object{
			"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed("upstreams.http.v3.HttpProtocolOptions", object{
				"explicit_http_config": object{"http2_protocol_options": http2Options(object{})},
			}),
		},
	}
}

// http2Options are Envoy's defaults but for the windows, which are small.
func http2Options(more object) object {
	more["initial_stream_window_size"] = 1 << 20
	more["initial_connection_window_size"] = 16 << 20
	return more
}

// terminating is a listener on the HBONE port that answers CONNECT: of some
// authorities by connecting to a cluster, of others with a status.
func terminating(f files, clusters map[string]string, statuses map[string]int, log string, identities ...string) object {
	var hosts list
	for authority, name := range clusters {
		hosts = append(hosts, object{"name": authority, "domains": list{authority}, "routes": list{object{
			"match": object{"connect_matcher": object{}},
			"route": object{
				"cluster": name, "timeout": "0s",
				"upgrade_configs": list{object{"upgrade_type": "CONNECT", "connect_config": object{}}},
			},
		}}})
	}
	for authority, status := range statuses {
		hosts = append(hosts, object{"name": authority, "domains": list{authority}, "routes": list{object{
			"match": object{"connect_matcher": object{}}, "direct_response": object{"status": status},
		}}})
	}
	return object{
		"name": "hbone", "stat_prefix": "hbone",
		"access_log": accessLog(log, object{"route": "hbone", "tls": "%DOWNSTREAM_TRANSPORT_FAILURE_REASON%"}),
		"address":    socketAddress(netip.AddrPortFrom(netip.IPv6Unspecified(), hbonePort)),
		"filter_chains": list{object{
			"transport_socket": transportSocket("DownstreamTlsContext", object{
				"common_tls_context": envoyTLS(f, identities...), "require_client_certificate": true,
			}),
			"filters": list{object{
				"name": "http",
				"typed_config": typed("filters.network.http_connection_manager.v3.HttpConnectionManager", object{
					"stat_prefix": "hbone", "codec_type": "HTTP2",
					"http2_protocol_options": http2Options(object{"allow_connect": true}),
					"upgrade_configs":        list{object{"upgrade_type": "CONNECT"}},
					"drain_timeout":          "0.2s",
					"route_config":           object{"virtual_hosts": hosts},
					"http_filters": list{object{
						"name": "router", "typed_config": typed("filters.http.router.v3.Router", object{}),
					}},
				}),
			}},
		}},
	}
}

func bootstrap(admin string, listeners, clusters list) object {
	return object{
		"node":             object{"id": "peer", "cluster": "peers"},
		"admin":            object{"address": object{"pipe": object{"path": admin}}},
		"static_resources": object{"listeners": listeners, "clusters": clusters},
	}
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

func envoyAdmin(e *env, name string) string {
	return filepath.Join(e.Dir, fmt.Sprintf("envoy-%s.sock", name))
}
