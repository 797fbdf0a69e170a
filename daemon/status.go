// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/snapshot"
)

// Status is what the admin socket says of the daemon, at GET /status.
type Status struct {
	PID         int          `json:"pid"`
	Version     string       `json:"version"`
	Node        string       `json:"node"`
	Started     time.Time    `json:"started"`
	Ready       bool         `json:"ready"` // each pod was tried
	RunDir      string       `json:"runDir"`
	Config      string       `json:"config"`                // its file
	Cgroup      string       `json:"cgroup"`                // at which the hooks are, in the hierarchy
	MemoryLimit int64        `json:"memoryLimit,omitempty"` // bytes that Go keeps to; 0: none
	Snapshot    uint64       `json:"snapshot"`              // version in force
	Modes       []string     `json:"modes"`                 // who takes plaintext, the widest first
	Files       []FileStatus `json:"files"`                 // those that were read again since the start
	Pods        []PodStatus  `json:"pods"`
}

// FileStatus is how the last reload of a file went.
type FileStatus struct {
	File  string    `json:"file"`
	Time  time.Time `json:"time"`
	Error string    `json:"error,omitempty"` // why the last good state is in force
}

// PodStatus is where a pod is in its life.
type PodStatus struct {
	Pod       string       `json:"pod"` // its key
	Identity  string       `json:"identity"`
	Netns     string       `json:"netns"`
	Addresses []netip.Addr `json:"addresses"`
	State     string       `json:"state"`
	Since     time.Time    `json:"since"`
	Failures  int          `json:"failures,omitempty"`
	Reason    string       `json:"reason,omitempty"`             // why it is not further
	Expires   *time.Time   `json:"certificateExpires,omitempty"` // of a pod that is ready
}

// statusHandler serves the Status as JSON.
type statusHandler struct {
	cfg         *config.Config
	version     string
	cgroup      string
	memoryLimit int64
	started     time.Time
	ready       *atomic.Bool
	keeper      *pod.Keeper
	reports     *reports
	store       *snapshot.Store
	identity    identity.Source
}

// ServeHTTP is http.Handler's.
func (h *statusHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	out := Status{
		PID: os.Getpid(), Version: h.version, Node: h.cfg.NodeName, Started: h.started, Ready: h.ready.Load(),
		RunDir: h.cfg.RunDir, Config: h.cfg.Path, Cgroup: h.cgroup, MemoryLimit: h.memoryLimit,
		Snapshot: h.store.Load().Version, Modes: []string{}, Files: h.reports.status(), Pods: []PodStatus{},
	}
	for _, m := range h.store.Load().Policy.Modes() {
		out.Modes = append(out.Modes, m.String())
	}
	for _, s := range h.keeper.Status() {
		out.Pods = append(out.Pods, PodStatus{
			Pod: s.Pod.Key(), Identity: s.Pod.Identity().String(), Netns: s.Pod.NetnsPath, Addresses: s.Pod.Addresses,
			State: s.State.String(), Since: s.Since, Failures: s.Failures, Reason: s.Reason, Expires: h.expiry(r.Context(), s),
		})
	}
	serveJSON(w, out)
}

// expiry is the end of the certificate that a pod has, which is issued by now.
func (h *statusHandler) expiry(ctx context.Context, s pod.Status) *time.Time {
	if s.State != pod.Ready {
		return nil
	}
	svid, err := h.identity.SVID(ctx, s.Pod.Identity())
	if err != nil {
		return nil
	}
	end := svid.Leaf().NotAfter
	return &end
}

func serveJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // the reader has gone
}

func (r *reports) status() []FileStatus {
	r.mu.Lock()
	last := maps.Clone(r.last)
	r.mu.Unlock()
	out := []FileStatus{}
	for name, l := range last {
		f := FileStatus{File: name, Time: l.at}
		if l.err != nil {
			f.Error = l.err.Error()
		}
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b FileStatus) int { return strings.Compare(a.File, b.File) })
	return out
}
