// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// A message says how long it is and what it holds: 8 bytes of length, the bytes,
// their SHA-256. Who takes one knows whether it is whole, however its connection
// ends. This is the oracle of the tests in which daemons die.

var (
	errShort   = errors.New("a clean end before the whole was there")
	errChanged = errors.New("other bytes than were sent")
	errMore    = errors.New("bytes after the end of the message")
)

// endless is the length of a message that is never finished.
const endless = 1 << 40

// content is what messages are made of, over and over: random bytes with the
// marker in each KiB, so that the witness on the wire sees any of it.
var content = sync.OnceValue(func() []byte {
	b := make([]byte, 256<<10)
	_, _ = rand.Read(b)
	for i := 0; i < len(b); i += 1 << 10 {
		copy(b[i:], marker)
	}
	return b
})

// give sends a message of n bytes.
func give(w io.Writer, n int64) error {
	var length [8]byte
	binary.BigEndian.PutUint64(length[:], uint64(n))
	if n <= 64<<10 { // one that is small, in one piece
		data := content()[:n]
		digest := sha256.Sum256(data)
		_, err := w.Write(append(append(length[:], data...), digest[:]...))
		return err
	}
	if _, err := w.Write(length[:]); err != nil {
		return err
	}
	h := sha256.New()
	for left := n; left > 0; {
		data := content()[:min(left, int64(len(content())))]
		_, _ = h.Write(data)
		if _, err := w.Write(data); err != nil {
			return err
		}
		left -= int64(len(data))
	}
	_, err := w.Write(h.Sum(nil))
	return err
}

// take reads a message and says what is wrong with it; n is how much of it came.
func take(r io.Reader) (n int64, err error) {
	defer func() {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errShort
		}
	}()
	var length [8]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return 0, err
	}
	h := sha256.New()
	if n, err = io.CopyN(h, r, int64(binary.BigEndian.Uint64(length[:]))); err != nil {
		return n, err
	}
	digest := make([]byte, sha256.Size)
	if _, err := io.ReadFull(r, digest); err != nil {
		return n, err
	}
	if !bytes.Equal(digest, h.Sum(nil)) {
		return n, errChanged
	}
	return n, nil
}

// takeEnd wants nothing more than the end of the stream.
func takeEnd(r io.Reader) error {
	switch n, err := io.CopyN(io.Discard, r, 1); {
	case n > 0:
		return errMore
	case err == io.EOF:
		return nil
	default:
		return err
	}
}

// isTold reports whether an application was told that it did not get all.
func isTold(err error) bool { return isReset(err) || isRefused(err) }

// tally counts how transfers ended.
type tally struct {
	whole, told atomic.Int64

	mu    sync.Mutex
	wrong []error // that ended in neither way
}

func (c *tally) count(what string, err error) {
	switch {
	case err == nil:
		c.whole.Add(1)
	case isTold(err):
		c.told.Add(1)
	default:
		c.mu.Lock()
		defer c.mu.Unlock()
		c.wrong = append(c.wrong, fmt.Errorf("%s %s: %w", time.Now().Format("15:04:05.000"), what, err))
	}
}

func (c *tally) String() string {
	whole, told := c.whole.Load(), c.told.Load()
	return fmt.Sprintf("%d transfers, %d whole, %d refused or reset", whole+told, whole, told)
}

func (c *tally) check(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.wrong) > 0 {
		t.Errorf("%d ended neither whole nor by an error that says so, the first: %v", len(c.wrong), errors.Join(c.wrong[:min(5, len(c.wrong))]...))
	}
}

// answerMessages gives back a message for each that it takes.
func answerMessages(c *net.TCPConn) error {
	for {
		n, err := take(c)
		if n == 0 && errors.Is(err, errShort) {
			return c.CloseWrite()
		}
		if err != nil {
			return err
		}
		if err := give(c, n); err != nil {
			return err
		}
	}
}

// caller makes requests until its context ends, each a message for a message.
// It goes on after a failure and is not told of any daemon.
type caller struct {
	*tally
	from *lab.Pod
	to   netip.AddrPort
	keep bool // on a connection that stays as long as it can
	done atomic.Int64

	c *net.TCPConn
	n int64 // requests
}

// run makes a request each 10 ms, which leaves the machine to the daemons.
func (r *caller) run(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			r.close()
			return
		case <-tick.C:
		}
		err := r.request()
		if err != nil || !r.keep {
			r.close()
		}
		r.count(fmt.Sprintf("request from %s to %s (kept: %v)", r.from.Name, r.to, r.keep), err)
		if err == nil {
			r.done.Add(1)
		}
	}
}

func (r *caller) close() {
	if r.c != nil {
		r.c.Close()
		r.c = nil
	}
}

func (r *caller) request() error {
	if r.c == nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience())
		defer cancel()
		c, err := r.from.Dial(ctx, r.to)
		if err != nil {
			return err
		}
		r.c = c
	}
	_ = r.c.SetDeadline(time.Now().Add(2 * patience()))
	r.n++
	size := 1 + r.n*7919%(48<<10)
	if err := give(r.c, size); err != nil {
		return err
	}
	if n, err := take(r.c); err != nil {
		return err
	} else if n != size {
		return errChanged
	}
	if r.keep {
		return nil
	}
	_ = r.c.CloseWrite() // of a connection that was reset: ENOTCONN, and the read says why
	return takeEnd(r.c)
}
