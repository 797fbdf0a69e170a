// SPDX-License-Identifier: Apache-2.0

// Package h2 is an HTTP/2 connection (RFC 9113) as a pure state machine, for
// CONNECT streams only: bytes go in, events and bytes come out.
//
// It opens no socket, starts no goroutine and reads no clock, so a connection
// can be frozen between any two calls, in the middle of a frame too, and
// thawed elsewhere. It knows no policy and nothing of what a request means:
// tunnel/hbone does.
//
// DATA is never gathered: it is handed out as it comes, in pieces that alias
// the input, and written by the caller, who lays it behind a header that
// PutData fills in. Everything else that is to be sent waits in Control. Every
// frame is parsed here, without allocation; HPACK is x/net/http2/hpack, with no
// dynamic table in our direction and none in the peer's once it has
// acknowledged our SETTINGS.
//
// Not done: server push, priorities, extended CONNECT, trailers on a
// connected stream (RFC 9113, section 8.5 forbids them), requests from servers.
//
// Nothing has to be closed: a connection that is dropped is gone. Nothing here
// is safe for concurrent use.
package h2

import (
	"errors"
	"fmt"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Limits of the protocol and ours. All are tested at the limit and above it.
const (
	// FrameHeaderLen is the length of a frame's header (RFC 9113, section 4.1).
	FrameHeaderLen = 9 // bytes

	// MaxDataFrame is the frame size we advertise. DATA is not gathered, so
	// it costs nothing.
	MaxDataFrame = 1 << 20 // bytes

	// MaxOtherFrame bounds every frame that has to be gathered whole.
	MaxOtherFrame = 16 << 10 // bytes

	// ConnWindow is the connection's receive window. It is refilled on
	// receipt, so it bounds only what is in flight between two updates;
	// memory is bounded by the streams' windows.
	ConnWindow = 64 << 20 // bytes

	// DefaultMaxStreams is what Config.MaxConcurrentStreams means when 0.
	DefaultMaxStreams = 1000

	// DefaultWindow is what Config.InitialWindow means when 0.
	DefaultWindow = 64 << 10 // bytes

	// DefaultMaxHeaderBytes is what Config.MaxHeaderBytes means when 0: the
	// size of a header list as in RFC 9113, section 6.5.2, and the length of
	// its encoding.
	DefaultMaxHeaderBytes = 16 << 10 // bytes

	// assumedPeerStreams is how many streams are opened before the peer's
	// SETTINGS say how many may be.
	assumedPeerStreams = 100

	// protocolWindow is a window's initial size by the protocol, and the
	// least we start a stream with, since a peer may send this much before
	// it has seen our SETTINGS.
	protocolWindow = 65535 // bytes

	maxWindow   = 1<<31 - 1 // bytes, RFC 9113, section 6.9.1
	maxStreamID = 1<<31 - 1

	// maxContinuations bounds the frames of one header block.
	maxContinuations = 16

	// maxFields bounds the fields of one header list. Requests and answers
	// of meshes have ten or so.
	maxFields = 64

	// maxReplies bounds what a peer that does not read can make us queue in
	// acknowledgements, window updates and resets.
	maxReplies = 64 << 10 // bytes

	// maxControl bounds everything queued: above it a peer opens no more
	// streams.
	maxControl = 1 << 20 // bytes

	// maxBudget is how many frames of no use (resets, empty DATA, frames for
	// streams that are gone, SETTINGS, unknown types, WINDOW_UPDATE beyond two for
	// each byte that we sent) a peer may send beyond
	// what useful ones earn: one for each earnBytes of data and for each
	// stream that was accepted, and all of them by Refill.
	maxBudget = 1000
	earnBytes = 1 << 10 // bytes

	// maxDebug bounds the text that a GOAWAY carries, in and out.
	maxDebug = 1 << 10 // bytes

	// keepEvents is how many events' memory a Scratch holds on to (36 KiB):
	// a record holds 224 frames of 64 bytes.
	keepEvents = 512

	// keepStreams is how many streams' map a connection without any holds on
	// to: maps do not shrink.
	keepStreams = 64

	// defaultTableSize is the HPACK dynamic table that a peer may use until
	// it has acknowledged our SETTINGS (RFC 9113, section 6.5.2).
	defaultTableSize = 4096 // bytes

	// defaultMaxFrame is the frame size that any peer accepts, and the most
	// that we send.
	defaultMaxFrame = 16 << 10 // bytes
)

// Errors of Open and Respond.
var (
	ErrStreamLimit  = errors.New("peer's limit of concurrent streams reached")
	ErrGoingAway    = errors.New("connection takes no new streams")
	ErrStreamIDs    = errors.New("stream identifiers used up")
	ErrStreamClosed = errors.New("stream closed")
	ErrHeaderSize   = errors.New("header list larger than the peer accepts")
	ErrServer       = errors.New("a server opens no streams")
)

// ConnError is a violation by the peer that ended the connection, with what
// the GOAWAY tells it.
type ConnError struct {
	Code   http2.ErrCode
	Detail string
}

func (e *ConnError) Error() string {
	return fmt.Sprintf("http/2 connection error %v: %s", e.Code, e.Detail)
}

// EventKind says what an Event reports.
type EventKind uint8

// The kinds of events.
const (
	EventHeaders          EventKind = iota + 1 // a request, or a final response
	EventData                                  // some bytes of a stream, never none
	EventEnd                                   // the peer ended its half of the stream
	EventReset                                 // the stream is gone; see Event.Local
	EventWritable                              // Sendable was 0 and no longer is
	EventGoAway                                // the peer takes no new streams
	EventSettings                              // the peer's first SETTINGS
	EventPong                                  // an answer to Ping
	EventStreamsAvailable                      // Open said ErrStreamLimit and no longer would
)

// Event is something that the peer did. Stream flags such as Closed may
// already be further than the event: they tell what has been parsed.
type Event struct {
	Kind   EventKind
	Local  bool          // EventReset: we reset it, for a violation by the peer
	Code   http2.ErrCode // EventReset, EventGoAway
	LastID uint32        // EventGoAway: the last stream that the peer processed
	Stream *Stream       // where the event is a stream's
	Data   []byte        // EventData; EventPong: 8 bytes; EventGoAway: debug data. Aliases the input
	// Headers are EventHeaders's fields. They are the receiver's to keep.
	Headers []hpack.HeaderField
}

// Config says how a connection behaves.
type Config struct {
	Client               bool   // which end this is
	MaxConcurrentStreams uint32 // that the peer may open; 0: DefaultMaxStreams
	InitialWindow        uint32 // a stream's receive window at its start, bytes; 0: DefaultWindow, at least 65,535
	MaxHeaderBytes       int    // of a header list, and of its encoding; 0: DefaultMaxHeaderBytes
}
