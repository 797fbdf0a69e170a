// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"slices"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// State is a frozen connection. Its fields are exported for encoding only.
type State struct {
	Config Config
	Error  *ConnError

	Mode       uint8
	Preface    uint8
	Partial    []byte
	FrameLen   int
	FrameType  uint8
	FrameFlags uint8
	FrameID    uint32
	Left, Pad  int
	Current    uint32 // stream whose DATA is being received
	Gather     []byte

	Block       []byte
	BlockID     uint32
	BlockEnd    bool
	BlockFrames int

	Table      []hpack.HeaderField // the peer's dynamic table, oldest first
	TableSize  uint32
	WantUpdate bool

	Control []byte
	Replies int

	NextID, PeerID uint32
	Limited        bool
	Streams        []StreamState

	SendWindow    int64
	ReceiveWindow int
	ReceiveDue    int
	Late          int

	Settled        bool
	PeerStreams    uint32
	PeerWindow     int
	PeerHeaderList uint64
	PeerTable      uint32

	Acked          bool
	Pings          int
	Budget, Earned int
	Updates        int
	GoneLast       uint32
	GoneSent       bool
	GonePeer       bool
	GoneLimit      uint32
}

// StreamState is a frozen stream.
type StreamState struct {
	ID                                          uint32
	SendWindow, ReceiveWindow, Target, Buffered int32
	LocalClosed, RemoteClosed, Closed           bool
	GotHeaders, SentHeaders, Connected, Starved bool
	Queue                                       []byte
}

// Freeze takes the state out of a connection. Every event that was returned
// must have been acted on. The connection is not to be used afterwards.
func (c *Conn) Freeze() State {
	st := State{
		Config: c.cfg, Error: c.err,
		Mode: uint8(c.mode), Preface: c.preface, Partial: slices.Clone(c.partial[:c.have]),
		FrameLen: c.frame.length, FrameType: uint8(c.frame.typ), FrameFlags: uint8(c.frame.flags), FrameID: c.frame.id,
		Left: c.left, Pad: c.pad, Gather: slices.Clone(c.gather),
		Block: slices.Clone(c.block), BlockID: c.blockID, BlockEnd: c.blockEnd, BlockFrames: c.blockFrames,
		TableSize: c.tableSize, WantUpdate: c.wantUpdate,
		Control: slices.Clone(c.Control()), Replies: c.replies,
		NextID: c.nextID, PeerID: c.peerID, Limited: c.limited,
		SendWindow: c.sendWin, ReceiveWindow: c.recvWin, ReceiveDue: c.recvDue, Late: c.late,
		Settled: c.settled, PeerStreams: c.peerStreams, PeerWindow: c.peerWindow,
		PeerHeaderList: c.peerHeaderList, PeerTable: c.peerTable,
		Acked: c.acked, Pings: c.pings, Budget: c.budget, Earned: c.earned, Updates: c.updates,
		GoneLast: c.goneLast, GoneSent: c.goneSent, GonePeer: c.gonePeer, GoneLimit: c.goneLimit,
	}
	if c.cur != nil && !c.cur.closed {
		st.Current = c.cur.id
	}
	if !c.acked && c.err == nil {
		st.Table = c.dumpTable()
	}
	for _, s := range c.sorted() {
		st.Streams = append(st.Streams, StreamState{
			ID: s.id, SendWindow: s.sendWin, ReceiveWindow: s.recvWin, Target: s.target, Buffered: s.buffered,
			LocalClosed: s.localClosed, RemoteClosed: s.remoteClosed, Closed: s.closed,
			GotHeaders: s.gotHeaders, SentHeaders: s.sentHeaders, Connected: s.connected, Starved: s.starved,
			Queue: slices.Concat(s.queue.chunks...),
		})
	}
	c.fail(http2.ErrCodeInternal, "frozen")
	return st
}

// Thaw makes a connection of a frozen one, with its streams in the order of
// their identifiers. Closed streams among them have bytes queued.
func Thaw(st State) (*Conn, []*Stream) {
	c := &Conn{
		cfg: st.Config, err: st.Error,
		mode: mode(st.Mode), preface: st.Preface,
		frame: frameHeader{st.FrameLen, http2.FrameType(st.FrameType), http2.Flags(st.FrameFlags), st.FrameID},
		left:  st.Left, pad: st.Pad, gather: slices.Clone(st.Gather),
		block: slices.Clone(st.Block), blockID: st.BlockID, blockEnd: st.BlockEnd, blockFrames: st.BlockFrames,
		tableSize: st.TableSize, wantUpdate: st.WantUpdate,
		ctl: slices.Clone(st.Control), replies: st.Replies,
		scratch: new(Scratch),
		streams: make(map[uint32]*Stream),
		nextID:  st.NextID, peerID: st.PeerID, limited: st.Limited,
		sendWin: st.SendWindow, recvWin: st.ReceiveWindow, recvDue: st.ReceiveDue, late: st.Late,
		settled: st.Settled, peerStreams: st.PeerStreams, peerWindow: st.PeerWindow,
		peerHeaderList: st.PeerHeaderList, peerTable: st.PeerTable,
		acked: st.Acked, pings: st.Pings, budget: st.Budget, earned: st.Earned, updates: st.Updates,
		goneLast: st.GoneLast, goneSent: st.GoneSent, gonePeer: st.GonePeer, goneLimit: st.GoneLimit,
	}
	c.have = uint8(copy(c.partial[:], st.Partial))
	c.newCodec()
	if c.acked {
		c.dec.SetAllowedMaxDynamicTableSize(0)
	} else {
		c.loadTable(st.Table)
	}
	streams := make([]*Stream, 0, len(st.Streams))
	for _, z := range st.Streams {
		s := &Stream{
			c: c, id: z.ID, sendWin: z.SendWindow, recvWin: z.ReceiveWindow, target: z.Target, buffered: z.Buffered,
			localClosed: z.LocalClosed, remoteClosed: z.RemoteClosed, closed: z.Closed,
			gotHeaders: z.GotHeaders, sentHeaders: z.SentHeaders, connected: z.Connected, starved: z.Starved,
		}
		s.Enqueue(z.Queue)
		c.streams[s.id] = s
		streams = append(streams, s)
		switch {
		case !c.ours(s.id):
			c.accepted++
		case !s.closed:
			c.opened++
		}
	}
	c.cur = c.streams[st.Current]
	return c, streams
}

func (c *Conn) sorted() []*Stream {
	all := make([]*Stream, 0, len(c.streams))
	for _, s := range c.streams {
		all = append(all, s)
	}
	slices.SortFunc(all, byID)
	return all
}

// staticTable is the number of entries in HPACK's static table (RFC 7541,
// appendix A); the dynamic table's follow, newest first.
const staticTable = 61

// dumpTable reads the decoder's dynamic table, oldest first, by asking for one
// entry after another until there is none. The decoder is of no use afterwards.
func (c *Conn) dumpTable() []hpack.HeaderField {
	var table []hpack.HeaderField
	c.dec.SetEmitFunc(func(f hpack.HeaderField) { table = append(table, f) })
	c.dec.SetEmitEnabled(true)
	for i := uint64(staticTable + 1); ; i++ {
		if _, err := c.dec.Write(appendInteger(nil, 0x80, 7, i)); err != nil {
			break
		}
	}
	slices.Reverse(table)
	return table
}

// loadTable gives a new decoder its dynamic table.
func (c *Conn) loadTable(table []hpack.HeaderField) {
	b := appendInteger(nil, 0x20, 5, uint64(c.tableSize))
	for _, f := range table {
		b = append(b, 0x40) // literal with incremental indexing, new name
		b = appendInteger(b, 0, 7, uint64(len(f.Name)))
		b = append(b, f.Name...)
		b = appendInteger(b, 0, 7, uint64(len(f.Value)))
		b = append(b, f.Value...)
	}
	c.dec.SetEmitEnabled(false)
	if _, err := c.dec.Write(b); err != nil {
		c.fail(http2.ErrCodeInternal, "frozen HPACK table: "+err.Error())
	}
	_ = c.dec.Close() // a block ends here; an error has been seen
}

// appendInteger appends an HPACK integer: RFC 7541, section 5.1.
func appendInteger(b []byte, first byte, prefix uint, n uint64) []byte {
	limit := uint64(1)<<prefix - 1
	if n < limit {
		return append(b, first|byte(n))
	}
	b = append(b, first|byte(limit))
	for n -= limit; n >= 0x80; n >>= 7 {
		b = append(b, byte(n)|0x80)
	}
	return append(b, byte(n))
}
