// SPDX-License-Identifier: Apache-2.0

package relay

// ring is a queue of relays that reuses its memory.
type ring struct {
	items []*Relay
	head  int
	n     int
}

func (q *ring) len() int { return q.n }

func (q *ring) push(r *Relay) {
	if q.n == len(q.items) {
		grown := make([]*Relay, max(4, 2*len(q.items)))
		for i := range q.n {
			grown[i] = q.items[(q.head+i)%len(q.items)]
		}
		q.items, q.head = grown, 0
	}
	q.items[(q.head+q.n)%len(q.items)] = r
	q.n++
}

func (q *ring) pop() *Relay {
	r := q.items[q.head]
	q.items[q.head] = nil
	q.head = (q.head + 1) % len(q.items)
	q.n--
	return r
}
