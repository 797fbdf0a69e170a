// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/record"
)

// Frames fill records: a DATA frame of maxData bytes, its header, and nothing
// else make one full record, so a frame never straddles two.
const (
	frameHeader = 9                                 // RFC 9113, section 4.1
	maxData     = record.MaxPlaintext - frameHeader // bytes of data in a full record
)

// Batches come in three sizes, in record slots. Small requests take the
// smallest, bulk the largest.
var classes = [...]int{1, 4, 16}

// keep is how many unused batches of each class a worker holds on to; the
// rest is the collector's. 1.0 + 1.0 + 1.0 MiB.
var keep = [...]int{64, 16, 4}

// batch is memory for some record slots behind each other. Full neighbours are
// contiguous ciphertext, one iovec.
type batch struct {
	mem   []byte
	class int
	used  []int // plaintext bytes in each slot, frame headers included
}

func (b *batch) slot(i int) []byte {
	return b.mem[i*record.SlotLen : (i+1)*record.SlotLen : (i+1)*record.SlotLen]
}

// batches is a worker's stock of them.
type batches struct {
	free [len(classes)][]*batch
}

func (p *batches) get(slots int) *batch {
	c := 0
	for classes[c] < slots && c < len(classes)-1 {
		c++
	}
	if n := len(p.free[c]); n > 0 {
		b := p.free[c][n-1]
		p.free[c] = p.free[c][:n-1]
		clear(b.used)
		return b
	}
	return &batch{mem: make([]byte, classes[c]*record.SlotLen), class: c, used: make([]int, classes[c])}
}

func (p *batches) put(b *batch) {
	if len(p.free[b.class]) < keep[b.class] {
		p.free[b.class] = append(p.free[b.class], b)
	}
}

// writer collects frames in record slots, then seals them. Frames of different
// streams share a record while they are small.
type writer struct {
	stock   *batches
	batches []*batch
	bi, si  int // the current slot
}

// minShare is the room in a begun record below which an application's bytes
// get a record of their own: 1 KiB.
const minShare = 1 << 10

// room makes the current slot one with at least n bytes of room and returns
// it with its used length.
func (w *writer) room(n int) (slot []byte, used int) {
	if w.bi == len(w.batches) {
		w.batches = append(w.batches, w.stock.get(1))
		w.si = 0
	}
	b := w.batches[w.bi]
	if record.MaxPlaintext-b.used[w.si] < n {
		w.next()
		return w.room(n)
	}
	return b.slot(w.si), b.used[w.si]
}

func (w *writer) grow(n int) { w.batches[w.bi].used[w.si] += n }

func (w *writer) next() {
	w.si++
	if w.si == len(w.batches[w.bi].used) {
		w.bi++
		w.si = 0
	}
}

// scatter lays out iovecs for up to limit bytes of data: first what is left in
// a begun record, then whole records. It moves nothing.
func (w *writer) scatter(iov []unix.Iovec, limit int) []unix.Iovec {
	bi, si := w.bi, w.si
	if bi < len(w.batches) {
		if used := w.batches[bi].used[si]; used > 0 {
			left := record.MaxPlaintext - used - frameHeader
			if left >= minShare {
				iov = append(iov, piece(w.batches[bi].slot(si), used, min(left, limit)))
				limit -= min(left, limit)
			} else {
				w.next() // too little left to be worth a frame
				bi, si = w.bi, w.si
				return w.scatterFresh(iov, limit, bi, si)
			}
			si++
			if si == len(w.batches[bi].used) {
				bi++
				si = 0
			}
		}
	}
	return w.scatterFresh(iov, limit, bi, si)
}

func (w *writer) scatterFresh(iov []unix.Iovec, limit, bi, si int) []unix.Iovec {
	for limit > 0 {
		if bi == len(w.batches) {
			w.batches = append(w.batches, w.stock.get((limit+maxData-1)/maxData))
		}
		n := min(maxData, limit)
		iov = append(iov, piece(w.batches[bi].slot(si), 0, n))
		limit -= n
		if si++; si == len(w.batches[bi].used) {
			bi++
			si = 0
		}
	}
	return iov
}

func piece(slot []byte, used, n int) unix.Iovec {
	return unix.Iovec{Base: &slot[record.HeaderLen+used+frameHeader], Len: uint64(n)}
}

// seal seals every used slot in order and appends the ciphertext's iovecs. The
// batches that carry it are appended to sent; unused ones go back to the stock.
// ok is false when the layer seals nothing any more: what was laid down is lost.
func (w *writer) seal(l *record.Layer, iov []unix.Iovec, sent []*batch) (_ []unix.Iovec, _ []*batch, ok bool) {
	ok = true
	for i, b := range w.batches {
		w.batches[i] = nil
		if b.used[0] == 0 {
			w.stock.put(b)
			continue
		}
		for s, n := range b.used {
			if n == 0 {
				break
			}
			slot := b.slot(s)
			if n = l.Seal(slot, n); n == 0 {
				ok = false
				break
			}
			iov = appendIovec(iov, slot[:n])
		}
		sent = append(sent, b)
	}
	w.batches = w.batches[:0]
	w.bi, w.si = 0, 0
	return iov, sent, ok
}

// appendIovec appends b, joined to the last iovec where it lies right behind.
func appendIovec(iov []unix.Iovec, b []byte) []unix.Iovec {
	if k := len(iov); k > 0 {
		last := &iov[k-1]
		if uintptr(unsafe.Pointer(last.Base))+uintptr(last.Len) == uintptr(unsafe.Pointer(&b[0])) {
			last.Len += uint64(len(b))
			return iov
		}
	}
	return append(iov, unix.Iovec{Base: &b[0], Len: uint64(len(b))})
}
