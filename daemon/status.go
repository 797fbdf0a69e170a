// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"maps"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/culvert-mesh/culvert/privilege"
)

// Status is what the admin socket says of the daemon, at GET /status.
type Status struct {
	PID          int          `json:"pid"`
	Version      string       `json:"version"`
	Node         string       `json:"node"`
	Started      time.Time    `json:"started"`
	Ready        bool         `json:"ready"` // each pod was tried
	RunDir       string       `json:"runDir"`
	Config       string       `json:"config"`                // its file
	Cgroup       string       `json:"cgroup"`                // at which the hooks are, in the hierarchy
	MemoryLimit  int64        `json:"memoryLimit,omitempty"` // bytes that Go keeps to; 0: none
	Capabilities string       `json:"capabilities"`          // those that the process has
	Seccomp      string       `json:"seccomp"`               // the configuration's word
	LogLevel     string       `json:"logLevel"`
	Snapshot     uint64       `json:"snapshot"` // version in force
	Modes        []string     `json:"modes"`    // who takes plaintext, the widest first
	Files        []FileStatus `json:"files"`    // those that were read again since the start
	Pods         []PodStatus  `json:"pods"`
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

// serveStatus serves the Status.
func (c *controls) serveStatus(w http.ResponseWriter, r *http.Request) {
	has, err := privilege.Capabilities()
	if err != nil {
		has = err.Error()
	}
	out := Status{
		PID: os.Getpid(), Version: c.version, Node: c.cfg.Node.Name, Started: c.started, Ready: c.ready.Load(),
		RunDir: c.cfg.RunDir, Config: c.cfg.Path, Cgroup: c.cgroup, MemoryLimit: c.memoryLimit, LogLevel: levelName(c.level),
		Capabilities: has, Seccomp: string(c.cfg.Seccomp),
		Snapshot: c.store.Load().Version, Modes: []string{}, Files: c.reports.status(), Pods: []PodStatus{},
	}
	for _, m := range c.store.Load().Policy.Modes() {
		out.Modes = append(out.Modes, m.String())
	}
	for _, s := range c.keeper.Status() {
		p := PodStatus{
			Pod: s.Pod.Key(), Identity: s.Pod.Identity().String(), Netns: s.Pod.NetnsPath, Addresses: s.Pod.Addresses,
			State: s.State.String(), Since: s.Since, Failures: s.Failures, Reason: s.Reason,
		}
		if svid := held(r.Context(), c.issuer, s); svid != nil {
			p.Expires = &svid.Leaf().NotAfter
		}
		out.Pods = append(out.Pods, p)
	}
	serveJSON(w, out)
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
