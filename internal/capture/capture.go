// SPDX-License-Identifier: Apache-2.0

// Package capture is the independent witness of tests, demo and benches: it reads every frame of one interface of one
// network namespace from an AF_PACKET socket, keeps the head of each TCP segment, and counts how often given markers
// crossed the wire. It shares no code with the tunnel and looks at nothing but frames.
//
// It does not follow TCP: a marker that is cut by two segments is found when the second follows the first in sequence,
// and each retransmission counts again. Who starts a Capture closes it.
package capture

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
)

const (
	// frameBuffer holds any frame, also those of BIG TCP (bytes).
	frameBuffer = 512 << 10
	// socketBuffer is the kernel's queue between the interface and us (bytes); what does not fit is counted as dropped.
	socketBuffer = 64 << 20
	// maxSegments bounds what one capture keeps in memory: about 100 bytes each. Beyond it Err reports the overflow,
	// because a proof from half of the frames is none.
	maxSegments = 2 << 20
	// maxFlows bounds the tails kept for markers that are cut by a segment's end.
	maxFlows = 64 << 10
)

// Config says what to capture.
type Config struct {
	// NS is the network namespace that holds the interface. Nil: the caller's.
	NS *netns.NS
	// Interface is the name of the interface.
	Interface string
	// Markers are byte strings to be counted wherever they appear in a frame.
	Markers []string
	// Pcap is a file to write every frame to. Empty: none.
	Pcap string
}

// Capture is a running capture.
type Capture struct {
	fd, wake int
	markers  [][]byte
	file     *os.File
	done     chan struct{}

	mu         sync.Mutex // guards what follows
	segments   []Segment
	seen       []int // per marker
	flows      map[flow]*tail
	unreadable int
	dropped    int
	err        error
	waiting    []chan struct{}
	closing    bool
	pcap       *bufio.Writer
}

type flow struct{ src, dst netip.AddrPort }

// tail is the end of what a flow carried last, for markers cut by a segment's end.
type tail struct {
	next  uint32
	bytes []byte
}

// Start begins to capture; frames sent after it has returned are seen. Needs CAP_NET_RAW in the namespace.
func Start(cfg Config) (*Capture, error) {
	c := &Capture{
		fd: -1, wake: -1,
		seen:  make([]int, len(cfg.Markers)),
		flows: make(map[flow]*tail),
		done:  make(chan struct{}),
	}
	for _, m := range cfg.Markers {
		if m == "" {
			return nil, errors.New("start capture: empty marker")
		}
		c.markers = append(c.markers, []byte(m))
	}
	open := func() error { return c.open(cfg.Interface) }
	var err error
	if cfg.NS != nil {
		err = cfg.NS.Do(open)
	} else {
		err = open()
	}
	if err == nil {
		c.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err == nil && cfg.Pcap != "" {
		if c.file, err = os.Create(cfg.Pcap); err == nil {
			c.pcap = bufio.NewWriterSize(c.file, 1<<20)
			err = writePcapHeader(c.pcap)
		}
	}
	if err != nil {
		c.release()
		return nil, fmt.Errorf("start capture on %s: %w", cfg.Interface, err)
	}
	go c.run()
	return c, nil
}

func (c *Capture) open(name string) error {
	ifc, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	// Protocol 0 until it is bound: otherwise frames of all interfaces of the namespace get in between.
	if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer); err != nil {
		return fmt.Errorf("set receive buffer: %w", err)
	}
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
		return fmt.Errorf("set timestamps: %w", err)
	}
	all := uint16(unix.ETH_P_ALL)
	if err := unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all<<8 | all>>8, Ifindex: ifc.Index}); err != nil {
		return fmt.Errorf("bind packet socket: %w", err)
	}
	return nil
}

func (c *Capture) run() {
	defer close(c.done)
	frame, oob := make([]byte, frameBuffer), make([]byte, 128)
	polls := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}, {Fd: int32(c.wake), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(polls, -1); err != nil && err != unix.EINTR {
			c.fail(fmt.Errorf("poll capture: %w", err))
		}
		// What waits is taken before the frames are read: they then hold all that was sent before the question.
		c.mu.Lock()
		waiting, closing := c.waiting, c.closing
		c.waiting = nil
		c.mu.Unlock()
		var count [8]byte
		unix.Read(c.wake, count[:]) // EAGAIN: nobody called

		c.drain(frame, oob)
		for _, w := range waiting {
			close(w)
		}
		if closing {
			return
		}
	}
}

// drain reads frames until none is left.
func (c *Capture) drain(frame, oob []byte) {
	for {
		n, oobn, flags, _, err := unix.Recvmsg(c.fd, frame, oob, unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return
		case err != nil: // ENETDOWN: the interface went away
			c.fail(fmt.Errorf("read frame: %w", err))
			return
		case flags&unix.MSG_TRUNC != 0:
			c.fail(fmt.Errorf("read frame: longer than %d bytes", len(frame)))
			continue
		}
		c.take(frame[:n], stamp(oob[:oobn]))
	}
}

// stamp returns the kernel's time of a frame.
func stamp(oob []byte) time.Time {
	for len(oob) > 0 {
		header, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			break
		}
		if header.Level == unix.SOL_SOCKET && header.Type == unix.SO_TIMESTAMPNS && len(data) >= 16 {
			sec := int64(nativeEndian.Uint64(data))
			return time.Unix(sec, int64(nativeEndian.Uint64(data[8:])))
		}
		oob = rest
	}
	return time.Now()
}

func (c *Capture) take(frame []byte, at time.Time) {
	seg, payload, k := parseFrame(frame)
	seg.Time = at

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pcap != nil {
		if err := writePcapFrame(c.pcap, at, frame); err != nil {
			c.setErr(fmt.Errorf("write pcap: %w", err))
		}
	}
	for i, m := range c.markers {
		c.seen[i] += bytes.Count(frame, m)
	}
	switch k {
	case kindUnreadable:
		c.unreadable++
	case kindTCP:
		if len(c.segments) == maxSegments {
			c.setErr(fmt.Errorf("more than %d segments", maxSegments))
			return
		}
		c.segments = append(c.segments, seg)
		c.follow(seg, payload)
	}
}

// follow counts the markers that begin in an earlier segment of the flow and end in this one.
func (c *Capture) follow(seg Segment, payload []byte) {
	if len(payload) == 0 || len(c.markers) == 0 {
		return
	}
	keep := 0
	for _, m := range c.markers {
		keep = max(keep, len(m)-1)
	}
	f := flow{seg.Src, seg.Dst}
	t := c.flows[f]
	switch {
	case t == nil && len(c.flows) == maxFlows:
		c.setErr(fmt.Errorf("more than %d flows", maxFlows))
		return
	case t == nil:
		t = new(tail)
		c.flows[f] = t
	case t.next != seg.Seq: // a hole, or sent again
		t.bytes = t.bytes[:0]
	}
	for i, m := range c.markers {
		// Only what crosses the border: at most len(m)-1 bytes on each side, so that neither side holds it alone.
		before, after := t.bytes[max(0, len(t.bytes)-(len(m)-1)):], payload[:min(len(payload), len(m)-1)]
		c.seen[i] += bytes.Count(slices.Concat(before, after), m)
	}
	t.next = seg.Seq + uint32(len(payload))
	if len(payload) >= keep {
		t.bytes = append(t.bytes[:0], payload[len(payload)-keep:]...)
		return
	}
	t.bytes = append(t.bytes, payload...)
	t.bytes = slices.Delete(t.bytes, 0, max(0, len(t.bytes)-keep))
}

func (c *Capture) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setErr(err)
}

func (c *Capture) setErr(err error) {
	if c.err == nil {
		c.err = err
	}
}

// Sync returns once every frame that was on the interface before the call has been counted. The counters call it.
func (c *Capture) Sync() {
	w := make(chan struct{})
	c.mu.Lock()
	if c.closing {
		c.mu.Unlock()
		<-c.done
		return
	}
	c.waiting = append(c.waiting, w)
	c.kick()
	c.mu.Unlock()
	<-w
}

// kick wakes the reader. The descriptor is open as long as closing is false under mu.
func (c *Capture) kick() {
	one := make([]byte, 8)
	nativeEndian.PutUint64(one, 1)
	unix.Write(c.wake, one) // can only fail when it is already as awake as can be
}

// Err returns what makes the capture incomplete: frames dropped, a limit reached, the interface gone. Ask it before
// believing a zero.
func (c *Capture) Err() error {
	c.Sync()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing {
		c.readDropped()
	}
	if c.err == nil && c.dropped > 0 {
		return fmt.Errorf("capture: the kernel dropped %d frames before they were read", c.dropped)
	}
	return c.err
}

func (c *Capture) readDropped() {
	stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS) // reading resets it
	if err != nil {
		c.setErr(fmt.Errorf("read packet statistics: %w", err))
		return
	}
	c.dropped += int(stats.Drops)
}

// Segments returns the segments seen so far for which the predicate holds; nil: all.
func (c *Capture) Segments(match func(Segment) bool) []Segment {
	c.Sync()
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Segment
	for _, s := range c.segments {
		if match == nil || match(s) {
			out = append(out, s)
		}
	}
	return out
}

// Count returns how many segments match, and the bytes of payload they carry.
func (c *Capture) Count(match func(Segment) bool) (segments int, payload int64) {
	for _, s := range c.Segments(match) {
		segments++
		payload += int64(s.Len)
	}
	return segments, payload
}

// Payload counts the segments that carry payload and match.
func (c *Capture) Payload(match func(Segment) bool) (segments int, payload int64) {
	return c.Count(func(s Segment) bool { return s.Len > 0 && (match == nil || match(s)) })
}

// Seen returns how often the i-th marker crossed the interface.
func (c *Capture) Seen(i int) int {
	c.Sync()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen[i]
}

// Unreadable returns how many frames may carry TCP but could not be read.
func (c *Capture) Unreadable() int {
	c.Sync()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.unreadable
}

// Close ends the capture; what was counted can still be asked for. It returns what Err returns.
func (c *Capture) Close() error {
	c.mu.Lock()
	first := !c.closing
	if first {
		c.closing = true
		c.kick()
	}
	c.mu.Unlock()
	<-c.done
	if !first {
		return c.Err()
	}
	c.mu.Lock()
	c.readDropped()
	if c.pcap != nil {
		if err := c.pcap.Flush(); err != nil {
			c.setErr(fmt.Errorf("write pcap: %w", err))
		}
	}
	c.mu.Unlock()
	c.release()
	return c.Err()
}

func (c *Capture) release() {
	for _, fd := range []*int{&c.fd, &c.wake} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
	if c.file != nil {
		c.file.Close()
		c.file = nil
	}
}
