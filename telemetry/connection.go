// SPDX-License-Identifier: Apache-2.0

// Package telemetry is what an operator sees of the traffic: one record for each
// connection and handshake, the access log and the metrics made of them. Event
// loops hand records over: nothing here makes them wait, for a lock that is held
// longer than a copy takes or for a reader of the log. It decides nothing about
// connections, and says nothing of its own in the daemon's log, for which it has a
// Spool.
//
// An AccessLog and a Spool have a goroutine each, which their Close ends. Metrics
// have none.
package telemetry

import (
	"crypto/tls"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/policy"
)

// Reason says how a connection ended: a closed list, the same in log, metric and
// the header that tells the far end.
type Reason string

// The reasons.
const (
	ReasonOK                 Reason = "ok"
	ReasonRefused            Reason = "refused"             // nobody listens at the destination
	ReasonUnreachable        Reason = "unreachable"         // no route, or ICMP says so
	ReasonTimeout            Reason = "timeout"             // no answer in time
	ReasonNoEndpoint         Reason = "no_endpoint"         // a service without endpoints
	ReasonUnknownDestination Reason = "unknown_destination" // inside the mesh's ranges, but nobody's
	ReasonDenied             Reason = "denied"              // by our policy; the rule is in the record
	ReasonDeniedByPeer       Reason = "denied_by_peer"      // by the far end's
	ReasonReset              Reason = "reset"               // by either application
	ReasonTunnelLost         Reason = "tunnel_lost"         // the session under it ended
	ReasonDraining           Reason = "draining"            // the daemon, the pod or the policy went
	ReasonLimit              Reason = "limit"               // a budget was used up
)

// Reasons returns the closed list, in the order of the documentation.
func Reasons() []Reason {
	return []Reason{
		ReasonOK, ReasonRefused, ReasonUnreachable, ReasonTimeout, ReasonNoEndpoint,
		ReasonUnknownDestination, ReasonDenied, ReasonDeniedByPeer, ReasonReset,
		ReasonTunnelLost, ReasonDraining, ReasonLimit,
	}
}

// ParseReason takes a reason from a peer. What is not on the list is not ok.
func ParseReason(s string) (r Reason, ok bool) {
	for _, r := range Reasons() {
		if string(r) == s {
			return r, true
		}
	}
	return "", false
}

// Event says what became of a connection, for the first look at its line.
type Event uint8

// The events.
const (
	Complete Event = iota // it was open, and has ended
	Refused               // it was never open; the reason says why
	Passed                // it was let pass by the tunnel, which sees no more of it
)

// String is fmt.Stringer's.
func (e Event) String() string { return [...]string{"complete", "refused", "passed"}[e] }

// SecurityPolicy says how a connection's bytes travelled between the nodes.
type SecurityPolicy string

// The values, as Istio names them.
const (
	MutualTLS       SecurityPolicy = "mutual_tls"
	Plaintext       SecurityPolicy = "none"
	SecurityUnknown SecurityPolicy = "unknown" // it ended before that was settled
)

// Reporter is the side that a record comes from, as Istio's metrics call it.
type Reporter string

// The sides.
const (
	ReporterSource      Reporter = "source"      // the client's node: outbound
	ReporterDestination Reporter = "destination" // the server's node: inbound
)

func reporters() []Reporter { return []Reporter{ReporterSource, ReporterDestination} }

// reporterOf is the side that sees connections in this direction.
func reporterOf(d policy.Direction) Reporter {
	if d == policy.Outbound {
		return ReporterSource
	}
	return ReporterDestination
}

// Endpoint is one end of a connection. What is not known is zero.
type Endpoint struct {
	Addr      netip.AddrPort // port 0: it is not known
	Workload  string
	Namespace string
	Identity  spiffeid.ID // only once it has been proven
	Claimed   bool        // Workload is what the peer says, of its own namespace: for the log only
}

// Connection is an application's connection, as one side saw it.
type Connection struct {
	Event     Event
	Direction policy.Direction
	Src       Endpoint // the application that connected
	Dst       Endpoint // the application that was connected to

	FromClient uint64 // bytes from Src to Dst; "received", in Istio's words
	ToClient   uint64 // bytes from Dst to Src; "sent", in Istio's words
	Start      time.Time
	Duration   time.Duration // from Start to the end

	// Of the session that carried it; zero where there was none.
	TLSVersion  uint16
	CipherSuite uint16
	Group       tls.CurveID

	Pod string // key of the pod whose end it is; for listings, not for the log

	Trace [16]byte // W3C trace ID, the same in the records of both ends; zero: none

	SecurityPolicy SecurityPolicy // empty: SecurityUnknown
	Reason         Reason
	Detail         string // for people; cut at 512 bytes in the log

	// What was decided, and by which rule of which snapshot. Rule is empty
	// where nothing was asked.
	Rule          string
	PolicyVersion uint64
}

// Handshake is the outcome of one TLS handshake between nodes.
type Handshake struct {
	Reporter Reporter
	Reason   string        // one of identity.Reasons; empty: it succeeded
	Duration time.Duration // from the first byte to the last
}
