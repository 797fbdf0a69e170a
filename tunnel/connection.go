// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net/netip"
	"time"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/telemetry"
	"github.com/culvert-mesh/culvert/tunnel/relay"
	"github.com/culvert-mesh/culvert/workload"
)

// connection is what the three kinds have in common: outbound, which a pod
// opened; inbound, which a peer asked for on a session; plain, which came in
// plaintext.
type connection struct {
	pod      *Pod
	src, dst netip.AddrPort
	peer     *workload.Workload // at the other end, as its address says; nil when unknown
	verdict  policy.Verdict
	start    time.Time
	flow     telemetry.Flow
	live     live
	opened   bool // and counted as such
	done     bool // reported

	reason telemetry.Reason // why it is being aborted
	detail string
}

// version is that of the snapshot that the connection rests on.
func (c *connection) version() uint64 { return c.verdict.Version }

// open counts a connection that both ends have. rec is its record.
func (c *connection) open(rec *telemetry.Connection) {
	c.opened = true
	c.flow = c.pod.t.cfg.Recorder.Opened(rec)
}

// finish ends what is known of the connection with its last record. The caller
// sees to it that there is one.
func (c *connection) finish(last *telemetry.Connection, why telemetry.Reason, detail string) {
	c.done = true
	c.live.unlink()
	if !c.opened {
		last.Event = telemetry.Refused
	}
	last.Reason, last.Detail = why, detail
	last.Duration = time.Since(c.start)
	c.pod.t.cfg.Recorder.Closed(&c.flow, last)
}

// outcome is the reason for which a relay, or a pipe, has ended. app and peer
// say which ends of the connection its application and its peer are.
func (c *connection) outcome(end relay.End, detail, app, peer string) (telemetry.Reason, string) {
	switch end {
	case relay.EndClean:
		return telemetry.ReasonOK, ""
	case relay.EndHoard:
		return telemetry.ReasonLimit, detail
	case relay.EndTrunkLost:
		return telemetry.ReasonTunnelLost, detail
	case relay.EndAppReset:
		return telemetry.ReasonReset, "by the " + app + ": " + detail
	case relay.EndPeerReset:
		return telemetry.ReasonReset, "by the " + peer + ": " + detail
	}
	return c.reason, c.detail // EndAborted
}
