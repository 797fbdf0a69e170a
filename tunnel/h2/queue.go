// SPDX-License-Identifier: Apache-2.0

package h2

// Chunks of a queue grow with what is in it.
const (
	minChunk = 512      // bytes
	maxChunk = 16 << 10 // bytes

	// keepChunks is how many chunks of maxChunk a Scratch holds on to, 1 MiB.
	keepChunks = 64
)

// queue is what an application did not take yet. Empty it holds no memory.
type queue struct {
	chunks [][]byte // none empty
	head   []byte   // all of the first one's memory
	size   int
}

// Meter has f told of each change of the memory that the connection's queues
// hold, in bytes, from what they hold now. It is not called for what fits into
// memory that they have.
func (c *Conn) Meter(f func(n int)) {
	c.meter = f
	if c.held != 0 {
		f(c.held)
	}
}

func (c *Conn) metered(n int) {
	c.held += n
	if c.meter != nil && n != 0 {
		c.meter(n)
	}
}

// chunk is memory for n bytes.
func (c *Conn) chunk(n int) []byte {
	if n > maxChunk/2 {
		n = max(n, maxChunk)
	}
	c.metered(n)
	if free := c.scratch.chunks; n == maxChunk && len(free) > 0 {
		p := free[len(free)-1]
		free[len(free)-1] = nil
		c.scratch.chunks = free[:len(free)-1]
		return p
	}
	return make([]byte, 0, n)
}

func (c *Conn) giveBack(p []byte) {
	c.metered(-cap(p))
	if cap(p) == maxChunk && len(c.scratch.chunks) < keepChunks {
		c.scratch.chunks = append(c.scratch.chunks, p[:0])
	}
}

// memory is how many bytes the queue holds, used or not.
func (q *queue) memory() int {
	if len(q.chunks) == 0 {
		return 0
	}
	n := cap(q.head)
	for _, p := range q.chunks[1:] {
		n += cap(p)
	}
	return n
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
		mem := s.c.chunk(max(len(p), min(max(q.size, minChunk), maxChunk)))
		if len(q.chunks) == 0 {
			q.head = mem
		}
		q.chunks = append(q.chunks, append(mem, p...))
	}
}

// Queued is what is queued, first chunk first. It is valid until the next
// Enqueue or Dequeue.
func (s *Stream) Queued() [][]byte { return s.queue.chunks }

// QueuedBytes is how many bytes are queued.
func (s *Stream) QueuedBytes() int { return s.queue.size }

// QueueMemory is how many bytes of memory the queue holds.
func (s *Stream) QueueMemory() int { return s.queue.memory() }

// Dequeue drops n bytes from the front of the queue. Call Taken as well.
func (s *Stream) Dequeue(n int) {
	q := &s.queue
	n = min(n, q.size)
	q.size -= n
	for n > 0 {
		if n < len(q.chunks[0]) {
			q.chunks[0] = q.chunks[0][n:]
			return
		}
		n -= len(q.chunks[0])
		s.c.giveBack(q.head)
		q.chunks[0], q.head = nil, nil
		if q.chunks = q.chunks[1:]; len(q.chunks) > 0 {
			q.head = q.chunks[0][:0]
		}
	}
	if q.size == 0 {
		*q = queue{}
	}
}

// Discard drops all that is queued, when nobody will take it.
func (s *Stream) Discard() {
	q := &s.queue
	for i, p := range q.chunks {
		if i == 0 {
			p = q.head
		}
		s.c.giveBack(p)
	}
	*q = queue{}
}

// Discard drops what is queued on every stream, when the connection has ended. The
// meter is told no more after that.
func (c *Conn) Discard() {
	for _, s := range c.streams {
		s.Discard()
	}
	// A stream that the peer reset is not among them any more, and where the same
	// Receive failed nobody was told of it.
	c.metered(-c.held)
	c.meter = nil
}

// Hoards calls f for each stream that has bytes queued. f may reset it.
func (c *Conn) Hoards(f func(*Stream)) {
	for _, s := range c.streams {
		if s.queue.size > 0 {
			f(s)
		}
	}
}
