// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"encoding/binary"
	"io"
	"time"
)

// nativeEndian is the byte order of what the kernel hands over, and of the pcap file (its magic number says which).
var nativeEndian = binary.NativeEndian

// The classic format with nanoseconds, as tcpdump and Wireshark read it
// (https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-05.html).
const (
	pcapMagicNanoseconds = 0xa1b23c4d
	pcapMajor            = 2
	pcapMinor            = 4
	pcapEthernet         = 1
)

func writePcapHeader(w io.Writer) error {
	var h [24]byte
	nativeEndian.PutUint32(h[0:], pcapMagicNanoseconds)
	nativeEndian.PutUint16(h[4:], pcapMajor)
	nativeEndian.PutUint16(h[6:], pcapMinor)
	nativeEndian.PutUint32(h[16:], frameBuffer)
	nativeEndian.PutUint32(h[20:], pcapEthernet)
	_, err := w.Write(h[:])
	return err
}

func writePcapFrame(w io.Writer, at time.Time, frame []byte) error {
	var h [16]byte
	nativeEndian.PutUint32(h[0:], uint32(at.Unix()))
	nativeEndian.PutUint32(h[4:], uint32(at.Nanosecond()))
	nativeEndian.PutUint32(h[8:], uint32(len(frame)))
	nativeEndian.PutUint32(h[12:], uint32(len(frame)))
	if _, err := w.Write(h[:]); err != nil {
		return err
	}
	_, err := w.Write(frame)
	return err
}
