// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"sync/atomic"
	"time"
)

// load is what a loop has, for who asks. Its own thread changes it, and only when
// a session or a connection comes or goes.
type load struct {
	sessions    [2]atomic.Int64 // by role
	connections [3]atomic.Int64 // by kind
}

// Those that open a session, and those that take one in.
const (
	asClient = iota
	asServer
)

// The kinds of connections.
const (
	kindOutbound = iota
	kindInbound
	kindPlain
)

// Load is what one of the event loops has, and has done.
type Load struct {
	Turns uint64
	CPU   time.Duration

	ClientSessions, ServerSessions int64 // tunnel connections, by who opened them
	Outbound, Inbound, Plaintext   int64 // connections of applications, those that are still being made among them
}

// Loads is the load of each event loop. It may be called from anywhere.
func (t *Tunnel) Loads() []Load {
	out := make([]Load, 0, len(t.workers))
	for _, w := range t.workers {
		l := Load{
			ClientSessions: w.load.sessions[asClient].Load(), ServerSessions: w.load.sessions[asServer].Load(),
			Outbound: w.load.connections[kindOutbound].Load(), Inbound: w.load.connections[kindInbound].Load(), Plaintext: w.load.connections[kindPlain].Load(),
		}
		l.Turns, l.CPU = w.Loop.Work()
		out = append(out, l)
	}
	return out
}

func (o *outbound) kind() int { return kindOutbound }
func (i *inbound) kind() int  { return kindInbound }
func (c *plain) kind() int    { return kindPlain }
