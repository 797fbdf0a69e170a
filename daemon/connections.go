// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"encoding/hex"
	"net/http"
	"net/netip"
	"time"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/telemetry"
)

// Connections is what the admin socket says of the connections that the tunnel
// has, at GET /connections.
type Connections struct {
	Total       int          `json:"total"` // more than are listed where those are too many
	Connections []Connection `json:"connections"`
}

// Connection is one that lives.
type Connection struct {
	Direction   string    `json:"direction"`
	Source      Party     `json:"source"`
	Destination Party     `json:"destination"`
	Security    string    `json:"security"` // mutual_tls; none: plaintext; unknown: it is being made
	Start       time.Time `json:"start"`
	Age         Seconds   `json:"ageSeconds"`
	Received    uint64    `json:"bytesReceived"` // from the source
	Sent        uint64    `json:"bytesSent"`     // to the source
}

// Refused is what the admin socket says of the connections that were refused last,
// or ended by the tunnel, at GET /connections/refused: the latest first.
type Refused struct {
	Total       uint64              `json:"total"` // since the start
	Connections []RefusedConnection `json:"connections"`
}

// RefusedConnection is one of them, and stands for those that were alike.
type RefusedConnection struct {
	Last          time.Time `json:"last"` // the latest
	Times         uint64    `json:"times"`
	Pod           string    `json:"pod,omitempty"`
	Direction     string    `json:"direction"`
	Source        Party     `json:"source"`
	Destination   Party     `json:"destination"`
	Reason        string    `json:"reason"`
	Detail        string    `json:"detail,omitempty"`
	Rule          string    `json:"rule,omitempty"`          // of the policy, or the mode, where that decided
	PolicyVersion uint64    `json:"policyVersion,omitempty"` // snapshot
	Trace         string    `json:"trace,omitempty"`         // as in the access log of both ends
}

// Party is one end of a connection. What is not known is empty.
type Party struct {
	Address   netip.AddrPort `json:"address"`
	Workload  string         `json:"workload,omitempty"`
	Namespace string         `json:"namespace,omitempty"`
	Identity  string         `json:"identity,omitempty"` // where it is proven, or the pod's own
}

// Seconds is a time that has passed.
type Seconds float64

// Plaintext is what the admin socket says of the connections that are in
// plaintext beside or through the tunnel, at GET /connections/plaintext. What is
// plaintext by configuration passes by the tunnel, and is not among them.
type Plaintext struct {
	Connections []PlaintextConnection `json:"connections"`
	Failed      map[string]string     `json:"failed,omitempty"` // pods that could not be looked at, and why
}

// The kinds of plaintext connections.
const (
	KindExisting   = "existing"   // from before the pod's enrolment
	KindPermissive = "permissive" // let in by the mode
)

// PlaintextConnection is one of them.
type PlaintextConnection struct {
	Kind        string     `json:"kind"`
	Pod         string     `json:"pod"` // whose it is
	Direction   string     `json:"direction"`
	Source      Party      `json:"source"`
	Destination Party      `json:"destination"`
	UID         *uint32    `json:"uid,omitempty"`   // of the application's socket
	Start       *time.Time `json:"start,omitempty"` // nil: not known, before the enrolment
}

func party(e telemetry.Endpoint) Party {
	p := Party{Address: e.Addr, Workload: e.Workload, Namespace: e.Namespace}
	if !e.Identity.IsZero() {
		p.Identity = e.Identity.String()
	}
	return p
}

func (c *controls) serveConnections(w http.ResponseWriter, r *http.Request) {
	all, total := c.tunnel.Connections(r.Context())
	out := Connections{Total: total, Connections: make([]Connection, 0, len(all))}
	for _, l := range all {
		out.Connections = append(out.Connections, Connection{
			Direction: l.Direction.String(), Source: party(l.Src), Destination: party(l.Dst), Security: security(l.SecurityPolicy),
			Start: l.Start, Age: Seconds(l.Duration.Seconds()), Received: l.FromClient, Sent: l.ToClient,
		})
	}
	serveJSON(w, out)
}

func security(s telemetry.SecurityPolicy) string {
	if s == "" {
		s = telemetry.SecurityUnknown
	}
	return string(s)
}

func (c *controls) servePlaintext(w http.ResponseWriter, r *http.Request) {
	out := Plaintext{Connections: []PlaintextConnection{}}
	workloads := c.store.Load().Workloads
	named := func(a netip.AddrPort) Party {
		p := Party{Address: a}
		if w, ok := workloads.ByAddr(a.Addr()); ok {
			p.Workload, p.Namespace = w.Name, w.Namespace
		}
		return p
	}
	for _, p := range c.existing.all() {
		found, err := c.existing.look(p)
		if err != nil {
			if out.Failed == nil {
				out.Failed = map[string]string{}
			}
			out.Failed[p.key] = err.Error()
		}
		for _, f := range found {
			l := PlaintextConnection{Kind: KindExisting, Pod: p.key, Direction: policy.Outbound.String(), Source: named(f.Local), Destination: named(f.Remote), UID: &f.UID}
			if f.Inbound {
				l.Direction, l.Source, l.Destination = policy.Inbound.String(), l.Destination, l.Source
			}
			out.Connections = append(out.Connections, l)
		}
	}
	all, _ := c.tunnel.Connections(r.Context())
	for _, l := range all {
		if l.SecurityPolicy == telemetry.Plaintext {
			out.Connections = append(out.Connections, PlaintextConnection{
				Kind: KindPermissive, Pod: l.Pod, Direction: l.Direction.String(), Source: party(l.Src), Destination: party(l.Dst), Start: &l.Start,
			})
		}
	}
	serveJSON(w, out)
}

func (c *controls) serveRefused(w http.ResponseWriter, _ *http.Request) {
	kept, total := c.refusals.List()
	out := Refused{Total: total, Connections: make([]RefusedConnection, 0, len(kept))}
	for _, k := range kept {
		l := RefusedConnection{
			Last: k.Last, Times: k.Times, Pod: k.Pod, Direction: k.Direction.String(), Source: party(k.Src), Destination: party(k.Dst),
			Reason: string(k.Reason), Detail: k.Detail, PolicyVersion: k.PolicyVersion,
		}
		if k.Reason == telemetry.ReasonDenied { // else it is what has let it through, here
			l.Rule = k.Rule
		}
		if k.Trace != ([16]byte{}) {
			l.Trace = hex.EncodeToString(k.Trace[:])
		}
		out.Connections = append(out.Connections, l)
	}
	serveJSON(w, out)
}
