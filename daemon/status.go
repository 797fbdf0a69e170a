// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"encoding/json"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/snapshot"
)

// status is what the admin socket says of the daemon.
type status struct {
	Snapshot uint64       `json:"snapshot"` // version in force
	Files    []fileStatus `json:"files"`    // those that were read again since the start
	Pods     []podStatus  `json:"pods"`
}

type fileStatus struct {
	File  string    `json:"file"`
	Time  time.Time `json:"time"`
	Error string    `json:"error,omitempty"` // why the last good state is in force
}

type podStatus struct {
	Pod       string       `json:"pod"` // its key
	Identity  string       `json:"identity"`
	Netns     string       `json:"netns"`
	Addresses []netip.Addr `json:"addresses"`
	State     string       `json:"state"`
	Since     time.Time    `json:"since"`
	Failures  int          `json:"failures,omitempty"`
	Reason    string       `json:"reason,omitempty"` // why it is not further
}

// statusHandler serves the status as JSON.
type statusHandler struct {
	keeper  *pod.Keeper
	reports *reports
	store   *snapshot.Store
}

// ServeHTTP is http.Handler's.
func (h statusHandler) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	out := status{Snapshot: h.store.Load().Version, Files: h.reports.status(), Pods: []podStatus{}}
	for _, s := range h.keeper.Status() {
		out.Pods = append(out.Pods, podStatus{
			Pod: s.Pod.Key(), Identity: s.Pod.Identity().String(), Netns: s.Pod.NetnsPath, Addresses: s.Pod.Addresses,
			State: s.State.String(), Since: s.Since, Failures: s.Failures, Reason: s.Reason,
		})
	}
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(out) // the reader has gone
}

func (r *reports) status() []fileStatus {
	r.mu.Lock()
	last := maps.Clone(r.last)
	r.mu.Unlock()
	out := []fileStatus{}
	for name, l := range last {
		f := fileStatus{File: name, Time: l.at}
		if l.err != nil {
			f.Error = l.err.Error()
		}
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b fileStatus) int { return strings.Compare(a.File, b.File) })
	return out
}
