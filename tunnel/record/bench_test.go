// SPDX-License-Identifier: Apache-2.0

package record

import (
	"crypto/tls"
	"fmt"
	"testing"
)

var benchSizes = []int{64, 1024, MaxPlaintext}

func BenchmarkSeal(b *testing.B) {
	for _, id := range suites {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("%s/%d", tls.CipherSuiteName(id), n), func(b *testing.B) {
				us, _ := pair(b, id)
				slot := make([]byte, SlotLen)
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					us.out.seq &= rekeyAfter - 1
					us.Seal(slot, n)
				}
			})
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	for _, id := range suites {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("%s/%d", tls.CipherSuiteName(id), n), func(b *testing.B) {
				us, peer := pair(b, id)
				r := seal(peer, make([]byte, n))
				slot := make([]byte, SlotLen)
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					copy(slot, r) // 1-2 % of the time: Open needs ciphertext each time
					us.in.seq = 0
					if _, _, err := us.Open(slot); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkAEAD is crypto/aes alone, in place, to compare BenchmarkSeal with.
func BenchmarkAEAD(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprintf("AES_128_GCM/%d", n), func(b *testing.B) {
			aead, err := newGCM(make([]byte, 16))
			if err != nil {
				b.Fatal(err)
			}
			nonce := make([]byte, ivLen)
			slot := make([]byte, SlotLen)
			b.SetBytes(int64(n))
			for b.Loop() {
				aead.Seal(slot[HeaderLen:HeaderLen], nonce, slot[HeaderLen:HeaderLen+n+1], slot[:HeaderLen])
			}
		})
	}
}

func TestNothingIsAllocated(t *testing.T) {
	for _, id := range suites {
		us, peer := pair(t, id)
		ours, theirs := make([]byte, SlotLen), make([]byte, SlotLen)
		if got := testing.AllocsPerRun(100, func() {
			n := peer.Seal(theirs, MaxPlaintext-9)
			if _, _, err := us.Open(theirs[:n]); err != nil {
				t.Fatal(err)
			}
			if us.NeedsControl() || us.Seal(ours, 100) == 0 {
				t.Fatal("not sealed")
			}
		}); got != 0 {
			t.Errorf("%s: %v allocations per record", tls.CipherSuiteName(id), got)
		}
	}
}
