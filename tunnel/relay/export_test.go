// SPDX-License-Identifier: Apache-2.0

package relay

import "time"

// FD is the relay's descriptor. Call it, and what follows, on the loop's thread.
func (r *Relay) FD() int { return r.fd }

// Age makes the trunk's last refill of the peer's budget d older.
func (t *Trunk) Age(d time.Duration) { t.refilled = t.refilled.Add(-d) }

// Ping asks the peer for an answer.
func (t *Trunk) Ping() { t.ping(t.w.Loop.Now()) }

// Pinging reports whether an answer has not come.
func (t *Trunk) Pinging() bool { return !t.pingAt.IsZero() }

// Meter tells the trunk's peer's account of memory.
func (t *Trunk) Meter(n int) { t.meter(n) }

// ReadBy sets how many bytes the trunk's next read may take.
func (t *Trunk) ReadBy(n int) { t.room = n }

// WholeRead is the most that a read takes.
const WholeRead = wholeRead

// NextRead is nextRead.
func NextRead(room, n int, frames uint64) int { return nextRead(room, n, frames) }

// Parts of a budget.
const (
	PeerPart  = peerPart
	FloorPart = floorPart
	HoardTime = hoardTime

	RequestShare = requestShare
	FrameShare   = frameShare
	LeastRead    = leastRead
)
