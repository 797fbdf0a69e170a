// SPDX-License-Identifier: Apache-2.0

package telemetry

// Recorder sends records to the metrics, the access log and the list of refusals.
// Each may be nil; a nil Recorder records nothing. It owns none.
type Recorder struct {
	Metrics  *Metrics
	Log      *AccessLog
	Refusals *Refusals
}

// Opened counts a connection that was let through. Keep the Flow with it.
func (r *Recorder) Opened(c *Connection) Flow {
	if r == nil || r.Metrics == nil {
		return Flow{}
	}
	return r.Metrics.Opened(c)
}

// Closed counts and logs a connection that has ended; see Metrics.Closed.
func (r *Recorder) Closed(f *Flow, c *Connection) {
	if r != nil && r.Metrics != nil {
		r.Metrics.Closed(f, c)
	}
	r.Told(c)
}

// Told logs a connection that is counted elsewhere: what the kernel has decided.
func (r *Recorder) Told(c *Connection) {
	if r == nil {
		return
	}
	if r.Log != nil {
		r.Log.Record(c)
	}
	if r.Refusals != nil {
		r.Refusals.Record(c)
	}
}

// Handshake counts a handshake.
func (r *Recorder) Handshake(h Handshake) {
	if r != nil && r.Metrics != nil {
		r.Metrics.Handshake(h)
	}
}
