// SPDX-License-Identifier: Apache-2.0

package h2

// Chunks of a queue grow with what is in it.
const (
	minChunk = 512      // bytes
	maxChunk = 16 << 10 // bytes
)

// queue is what an application did not take yet. Empty it holds no memory.
type queue struct {
	chunks [][]byte // none empty
	size   int
}

// Enqueue copies bytes that the application did not take. They stay within the
// stream's window. Of a stream that was reset they are dropped.
func (s *Stream) Enqueue(p []byte) {
	if s.reset {
		return
	}
	q := &s.queue
	q.size += len(p)
	if n := len(q.chunks); n > 0 && len(p) > 0 {
		last := q.chunks[n-1]
		k := min(cap(last)-len(last), len(p))
		q.chunks[n-1] = append(last, p[:k]...)
		p = p[k:]
	}
	if len(p) > 0 {
		n := max(len(p), min(max(q.size, minChunk), maxChunk))
		q.chunks = append(q.chunks, append(make([]byte, 0, n), p...))
	}
}

// Queued is what is queued, first chunk first. It is valid until the next
// Enqueue or Dequeue.
func (s *Stream) Queued() [][]byte { return s.queue.chunks }

// QueuedBytes is how many bytes are queued.
func (s *Stream) QueuedBytes() int { return s.queue.size }

// Dequeue drops n bytes from the front of the queue. Call Taken as well.
func (s *Stream) Dequeue(n int) {
	q := &s.queue
	n = min(n, q.size)
	q.size -= n
	i := 0
	for n > 0 {
		if n < len(q.chunks[i]) {
			q.chunks[i] = q.chunks[i][n:]
			break
		}
		n -= len(q.chunks[i])
		q.chunks[i] = nil
		i++
	}
	if q.chunks = q.chunks[i:]; q.size == 0 {
		q.chunks = nil
	}
}
