// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// Event is a decision of the programs that a user is to hear of: a connection
// that was refused, one to a destination that takes plaintext, an option that
// was refused.
type Event struct {
	Pod      string // as PodConfig names it; "": none that this process has
	Decision string // as Counters names it
	// Src is the client. In connect() it has no port yet, and its address is
	// the pod's; invalid where the pod has none of that family.
	Src, Dst netip.AddrPort
	Time     time.Time
	// Who called connect(); else 0 and "". Comm may be anything.
	UID  uint32
	Comm string
}

// event is struct event of bpf/culvert.h.
type event struct {
	Cookie       uint64
	NS           uint64
	Decision     uint32
	UID          uint32
	Src, Dst     [16]byte
	SPort, DPort uint16
	Comm         [16]byte
	_            uint32
}

const (
	// lookEvery is the time between two looks for events. Nothing wakes the
	// reader: a flood of refusals is not to be a flood of wakeups.
	lookEvery = 100 * time.Millisecond
	// lookShare is how many events a look takes, somewhat more than the ring
	// holds: a pod that fills it as fast as it is read does not have a CPU.
	lookShare = 3000
)

// Events gives each event to f until ctx ends, those from before the call first.
// The programs never wait for it: of what finds no room only the number is left,
// the counter event_lost. There is one reader at a time.
func (n *Node) Events(ctx context.Context, f func(Event)) error {
	r, err := ringbuf.NewReader(n.maps.Events)
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	defer r.Close()
	rest := time.NewTimer(lookEvery)
	defer rest.Stop()
	var record ringbuf.Record
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-rest.C:
		}
		r.SetDeadline(time.Now()) // what is there, and no waiting
		for range lookShare {
			if ctx.Err() != nil {
				return nil
			}
			err := r.ReadInto(&record)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return fmt.Errorf("read events: %w", err)
			}
			e, err := n.event(record.RawSample)
			if err != nil {
				return err
			}
			f(e)
		}
		rest.Reset(lookEvery)
	}
}

func (n *Node) event(sample []byte) (Event, error) {
	var raw event
	if _, err := binary.Decode(sample, binary.LittleEndian, &raw); err != nil {
		return Event{}, fmt.Errorf("read events: one of %d bytes: %w", len(sample), err)
	}
	out := Event{
		Pod:  n.podOf(raw.Cookie),
		Src:  addrPortOf(raw.Src, raw.SPort),
		Dst:  addrPortOf(raw.Dst, raw.DPort),
		UID:  raw.UID,
		Comm: string(bytes.TrimRight(raw.Comm[:], "\x00")),
	}
	if int(raw.Decision) < len(n.decisions) {
		out.Decision = n.decisions[raw.Decision]
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return Event{}, fmt.Errorf("read events: look at the clock: %w", err)
	}
	out.Time = time.Now().Add(-time.Duration(now.Nano() - int64(raw.NS)))
	return out, nil
}

// addrPortOf is what struct address says; all zero: not valid.
func addrPortOf(a [16]byte, port uint16) netip.AddrPort {
	if a == [16]byte{} {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom16(a).Unmap(), port)
}

func (n *Node) podOf(cookie uint64) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p, ok := n.pods[cookie]; ok {
		return p.cfg.Name
	}
	return ""
}
