// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/culvert-mesh/culvert/admin"
	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/identity/ca"
	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/snapshot"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel"
)

// controls is what the admin socket serves. All it does is read, but for the level
// of the log.
type controls struct {
	cfg         *config.Config
	version     string
	cgroup      string
	memoryLimit int64
	started     time.Time
	ready       *atomic.Bool
	log         *slog.Logger
	level       *slog.LevelVar
	lines       *Lines
	keeper      *pod.Keeper
	reports     *reports
	store       *snapshot.Store
	issuer      *ca.Authority
	trust       *trust
	tunnel      *tunnel.Tunnel
	existing    *existing
	refusals    *telemetry.Refusals
	metrics     http.Handler
}

func (c *controls) mounts() []admin.Mount {
	get := func(path string, serve http.HandlerFunc) admin.Mount {
		return admin.Mount{Pattern: "GET " + path, Handler: serve}
	}
	return []admin.Mount{
		get("/status", c.serveStatus),
		get("/connections", c.serveConnections),
		get("/connections/plaintext", c.servePlaintext),
		get("/connections/refused", c.serveRefused),
		get("/workloads", c.serveWorkloads),
		get("/certs", c.serveCerts),
		{Pattern: "GET /metrics", Handler: c.metrics},
		get("/log", c.serveLog),
		get("/log-level", c.serveLevel),
		{Pattern: "POST /log-level", Handler: http.HandlerFunc(c.setLevel)},
	}
}

func serveJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // the reader has gone
}

// Workload is one that the node knows of, at GET /workloads.
type Workload struct {
	Workload  string       `json:"workload"`
	Namespace string       `json:"namespace"`
	Identity  string       `json:"identity"`
	Protocol  string       `json:"protocol"` // hbone, or tcp: in plaintext
	Node      string       `json:"node,omitempty"`
	Addresses []netip.Addr `json:"addresses"`
}

func (c *controls) serveWorkloads(w http.ResponseWriter, _ *http.Request) {
	all := c.store.Load().Workloads
	out := make([]Workload, 0, all.Len())
	for l := range all.All() {
		out = append(out, Workload{
			Workload: l.Name, Namespace: l.Namespace, Identity: l.Identity().String(), Protocol: l.Protocol.String(), Node: l.Node, Addresses: l.Addresses,
		})
	}
	serveJSON(w, out)
}

func (c *controls) serveCerts(w http.ResponseWriter, _ *http.Request) {
	serveJSON(w, identity.Trees(c.issuer.Certificates(), time.Now(), c.trust.Denied))
}

func (c *controls) serveLog(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write(c.lines.Last()) // the reader has gone
}

// LogLevel is how much the daemon logs, at GET /log-level. POST takes one.
type LogLevel struct {
	Level string `json:"level"` // debug, info, warn, error
}

func levelName(l *slog.LevelVar) string { return strings.ToLower(l.Level().String()) }

func (c *controls) serveLevel(w http.ResponseWriter, _ *http.Request) {
	serveJSON(w, LogLevel{levelName(c.level)})
}

func (c *controls) setLevel(w http.ResponseWriter, r *http.Request) {
	var asked LogLevel
	var level slog.Level
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10)).Decode(&asked)
	if err == nil {
		level, err = config.ParseLevel(asked.Level)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if before := levelName(c.level); before != asked.Level {
		// By the lower of the two, or the one that shuts the log would not be in it.
		c.level.Set(min(level, c.level.Level()))
		c.log.Warn("log level changed by the admin socket, until the next start", "from", before, "to", asked.Level)
		c.level.Set(level)
	}
	c.serveLevel(w, r)
}
