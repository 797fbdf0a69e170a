// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/culvert-mesh/culvert/config/strict"
)

// YAML writes the configuration as a file that has every key, with paths made
// absolute. Parse reads it back to the same values.
func (c *Config) YAML() ([]byte, error) {
	// Each item of a mapping is its key and its value; a map of Go has no order.
	type items = []*yaml.Node
	style := yaml.Options(yaml.WithLineWidth(-1), yaml.WithQuotePreference(yaml.QuoteDouble))
	var failed error
	node := func(value any) *yaml.Node {
		var n yaml.Node
		failed = errors.Join(failed, n.Dump(value, style))
		return &n
	}
	item := func(name string, value any) items { return items{node(name), node(value)} }
	duration := func(name string, d time.Duration) items { return item(name, strict.FormatDuration(d)) }
	mapping := func(parts ...items) *yaml.Node {
		return &yaml.Node{Kind: yaml.MappingNode, Content: slices.Concat(parts...)}
	}
	object := func(name string, parts ...items) items { return items{node(name), mapping(parts...)} }

	all := mapping(
		object("node", item("name", c.Node.Name)),
		item("runDir", c.RunDir),
		item("trustDomain", c.TrustDomain.Name()),
		object("identity",
			object("ca", item("dir", c.Identity.CA.Dir), duration("leafTTL", c.Identity.CA.LeafTTL)),
			item("trustFile", c.Identity.TrustFile)),
		object("workloads", item("file", c.Workloads.File)),
		object("pods", item("file", c.Pods.File)),
		object("policy", item("file", c.Policy.File)),
		object("mesh", item("cidrs", texts(c.Mesh.CIDRs))),
		object("bypass", item("cidrs", texts(c.Bypass.CIDRs))),
		item("mode", string(c.Mode)),
		item("existing", string(c.Existing)),
		item("seccomp", string(c.Seccomp)),
		item("loops", c.Loops),
		item("cgroup", c.Cgroup),
		object("metrics", item("address", c.Metrics.Address.String())),
		object("accessLog", item("format", string(c.AccessLog.Format)), item("queue", c.AccessLog.Queue)),
		object("log", item("level", strings.ToLower(c.Log.Level.String())), item("format", string(c.Log.Format))),
		object("tunnel",
			duration("idle", c.Tunnel.Idle),
			duration("handshakeTimeout", c.Tunnel.HandshakeTimeout),
			duration("connectTimeout", c.Tunnel.ConnectTimeout),
			duration("pingAfter", c.Tunnel.PingAfter),
			duration("deadAfter", c.Tunnel.DeadAfter),
			item("memory", c.Tunnel.Memory)),
	)
	b, err := yaml.Dump(all, style)
	if err = errors.Join(failed, err); err != nil {
		return nil, fmt.Errorf("write configuration: %w", err)
	}
	return b, nil
}

func texts(list []netip.Prefix) []string {
	out := make([]string, len(list))
	for i, p := range list {
		out[i] = p.String()
	}
	return out
}
