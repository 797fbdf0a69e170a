// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"time"

	"golang.org/x/net/http2/hpack"

	"github.com/culvert-mesh/culvert/tunnel/h2"
	"github.com/culvert-mesh/culvert/tunnel/loop"
)

// requestShare is how many requests of peers a loop's turn takes up, of all its
// trunks in turn: each makes a socket and a connection, some 50 us of work, and
// one read can bring a thousand. What one peer asks for is not to keep the others
// waiting for longer than some tenths of a millisecond.
const requestShare = 4

// asked is a request that has not been taken up yet.
type asked struct {
	st     *h2.Stream
	fields []hpack.HeaderField
}

// requests are the worker's trunks whose peers ask for something.
type requests struct {
	w     *Worker
	turn  time.Time // the present one
	left  int       // of its share
	again bool      // the loop has been asked to come back
	first []*Trunk
}

// ask notes a request. Until it has been taken up the trunk is not read, and the
// stream's data is queued.
func (t *Trunk) ask(st *h2.Stream, fields []hpack.HeaderField) {
	if len(t.requests) == 0 {
		t.w.requests.first = append(t.w.requests.first, t)
	}
	t.requests = append(t.requests, asked{st, fields})
}

// serve takes up what this turn has left of its share, one request of each trunk
// after the other.
func (q *requests) serve() {
	if len(q.first) == 0 {
		return
	}
	if now := q.w.Loop.Now(); now != q.turn {
		q.turn, q.left = now, requestShare
	}
	for q.left > 0 && len(q.first) > 0 {
		t := q.first[0]
		q.first[0] = nil
		q.first = q.first[1:]
		if len(t.requests) > 0 && !t.closed {
			a := t.requests[0]
			t.requests[0] = asked{}
			t.requests = t.requests[1:]
			q.left--
			t.owner.Request(t, a.st, a.fields)
			t.wantFlush()
		}
		switch {
		case t.closed:
			t.requests = nil
		case len(t.requests) > 0:
			q.first = append(q.first, t)
		default:
			t.requests = nil
			if t.unread {
				t.w.Loop.Again(t)
			}
			t.maybeDrained()
		}
	}
	if len(q.first) > 0 && !q.again {
		q.again = true
		q.w.Loop.Again(q)
	}
}

// Ready is the loop's.
func (q *requests) Ready(loop.Events) {
	q.again = false
	q.serve()
}
