// SPDX-License-Identifier: Apache-2.0

package h2

import (
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// State is a frozen connection. It can be coded by encoding/gob and
// encoding/json.
type State struct {
	Config  Config
	Control []byte
	Replies int
	Streams []StreamState

	NextID, LastPeer, PeerStreams  uint32
	Limited, GoAwaySent, GoAwayGot bool
	GoAwayLast                     uint32
	TableUpdated                   bool
	SendWindow, InitialSend        int64
	RecvWindow                     int64
	SettingsGot, SettingsAcked     bool
	Nuisance                       int

	Preface  int
	Head     []byte // of the next frame
	InFrame  bool
	Frame    FrameState
	Buffered []byte
	Left     int
	Pad      int
	PadNext  bool
	Data     uint32 // stream of the DATA frame that has begun, 0: none

	Block      []byte
	InBlock    bool
	BlockID    uint32
	BlockFlags uint8
	BlockCount int
	Table      []hpack.HeaderField // the peer's dynamic table, newest first

	Failed     bool
	FailedCode http2.ErrCode
	FailedWhy  string
}

// FrameState is a frame header.
type FrameState struct {
	Length int
	Type   uint8
	Flags  uint8
	Stream uint32
}

// StreamState is a frozen stream.
type StreamState struct {
	ID                        uint32
	SendWindow, RecvWindow    int64
	Pending, Target           int64
	Answered, HeadersGot      bool
	Tunnel                    bool
	LocalClosed, RemoteClosed bool
	Queue                     []byte
}

// Freeze takes the connection's state. Neither it nor its streams are to be
// used afterwards.
func (c *Conn) Freeze() State {
	st := State{
		Config:  c.cfg,
		Control: append([]byte(nil), c.Control()...),
		Replies: c.replies,

		NextID: c.nextID, LastPeer: c.lastPeer, PeerStreams: c.peerStreams,
		Limited: c.limited, GoAwaySent: c.goAwaySent, GoAwayGot: c.goAwayGot,
		GoAwayLast:   c.goAwayLast,
		TableUpdated: c.tableUpdated,
		SendWindow:   c.sendWindow, InitialSend: c.initialSend,
		RecvWindow:  c.recvWindow,
		SettingsGot: c.settingsGot, SettingsAcked: c.settingsAcked,
		Nuisance: c.nuisance,

		Preface:  c.preface,
		Head:     append([]byte(nil), c.head[:c.headN]...),
		InFrame:  c.inFrame,
		Frame:    FrameState{c.frame.length, c.frame.typ, c.frame.flags, c.frame.id},
		Buffered: c.buf,
		Left:     c.left, Pad: c.pad, PadNext: c.padNext,

		Block: c.block, InBlock: c.inBlock,
		BlockID: c.blockID, BlockFlags: c.blockFlags, BlockCount: c.blockCount,
		Table: c.table(),
	}
	if c.data != nil && !c.data.remoteClosed {
		st.Data = c.data.id
	}
	if c.failed != nil {
		st.Failed, st.FailedCode, st.FailedWhy = true, c.failed.Code, c.failed.Detail
	}
	c.Streams(func(s *Stream) {
		ss := StreamState{
			ID:         s.id,
			SendWindow: s.sendWindow, RecvWindow: s.recvWindow,
			Pending: s.pending, Target: s.target,
			Answered: s.answered, HeadersGot: s.headersGot,
			Tunnel:      s.tunnel,
			LocalClosed: s.localClosed, RemoteClosed: s.remoteClosed,
		}
		for _, q := range s.queue {
			ss.Queue = append(ss.Queue, q...)
		}
		st.Streams = append(st.Streams, ss)
	})
	c.failed = &ConnError{Code: http2.ErrCodeInternal, Detail: "connection is frozen"}
	return st
}

// Thaw makes a connection of a frozen one, with its streams in the order of
// their start. Their User is nil.
func Thaw(st State) (*Conn, []*Stream) {
	c := &Conn{
		cfg:     st.Config,
		scratch: new(Scratch),
		ctl:     st.Control,
		replies: st.Replies,

		nextID: st.NextID, lastPeer: st.LastPeer, peerStreams: st.PeerStreams,
		limited: st.Limited, goAwaySent: st.GoAwaySent, goAwayGot: st.GoAwayGot,
		goAwayLast:   st.GoAwayLast,
		tableUpdated: st.TableUpdated,
		sendWindow:   st.SendWindow, initialSend: st.InitialSend,
		recvWindow:  st.RecvWindow,
		settingsGot: st.SettingsGot, settingsAcked: st.SettingsAcked,
		nuisance: st.Nuisance,

		preface: st.Preface,
		headN:   min(len(st.Head), frameHeaderLen-1),
		inFrame: st.InFrame,
		frame:   frame{st.Frame.Length, st.Frame.Type, st.Frame.Flags, st.Frame.Stream},
		buf:     st.Buffered,
		left:    st.Left, pad: st.Pad, padNext: st.PadNext,

		block: st.Block, inBlock: st.InBlock,
		blockID: st.BlockID, blockFlags: st.BlockFlags, blockCount: st.BlockCount,
	}
	copy(c.head[:c.headN], st.Head)
	if st.Failed {
		c.failed = &ConnError{Code: st.FailedCode, Detail: st.FailedWhy}
	}
	if len(st.Table) > 0 {
		c.restoreTable(st.Table)
	}
	streams := make([]*Stream, 0, len(st.Streams))
	for _, ss := range st.Streams {
		s := c.newStream(ss.ID)
		s.sendWindow, s.recvWindow = ss.SendWindow, ss.RecvWindow
		s.pending, s.target = ss.Pending, ss.Target
		s.answered, s.headersGot = ss.Answered, ss.HeadersGot
		s.tunnel = ss.Tunnel
		s.localClosed, s.remoteClosed = ss.LocalClosed, ss.RemoteClosed
		s.Enqueue(ss.Queue)
		c.closed(s)
		streams = append(streams, s)
	}
	c.data = c.streams[st.Data]
	return c, streams
}

// table reads the dynamic table out of the decoder, by decoding its indexes:
// that changes nothing in it.
func (c *Conn) table() []hpack.HeaderField {
	if c.dec == nil {
		return nil
	}
	var t []hpack.HeaderField
	c.dec.SetEmitFunc(func(f hpack.HeaderField) { t = append(t, f) })
	const static = 61 // entries, RFC 7541, appendix A
	for i := static + 1; ; i++ {
		b := []byte{0x80 | byte(i)}
		if i >= 0x7f {
			b = appendLength(nil, 0x80, i)
		}
		if _, err := c.dec.Write(b); err != nil {
			break // there is no such entry
		}
		if c.dec.Close() != nil {
			break
		}
	}
	c.dec = nil
	return t
}

// restoreTable makes a decoder with this table. It may hold more than the peer
// allows itself, if it has chosen a smaller one: then the oldest entries are
// never asked for.
func (c *Conn) restoreTable(t []hpack.HeaderField) {
	var b []byte
	for i := len(t) - 1; i >= 0; i-- {
		b = append(b, 0x40) // literal with incremental indexing, section 6.2.1
		b = appendString(b, t[i].Name)
		b = appendString(b, t[i].Value)
	}
	d := c.decoder()
	d.SetEmitFunc(func(hpack.HeaderField) {})
	if _, err := d.Write(b); err == nil {
		_ = d.Close()
	}
	d.SetEmitFunc(nil)
}
