// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/workload"
)

// BenchmarkLookup is what a connection asks of the snapshot: who lives at an
// address, and the verdict. It is not to depend on how many there are.
func BenchmarkLookup(b *testing.B) {
	for _, size := range []int{10, 1000, 100_000} {
		b.Run(fmt.Sprintf("%d workloads", size), func(b *testing.B) {
			list := make([]workload.Workload, size)
			addrs := make([]netip.Addr, size)
			for i := range list {
				addrs[i] = netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
				list[i] = workload.Workload{
					UID: fmt.Sprint(i), Name: fmt.Sprint(i), Namespace: "demo", ServiceAccount: fmt.Sprint(i % 10000), TrustDomain: "cluster.local",
					Addresses: addrs[i : i+1],
				}
			}
			table, err := workload.NewTable(list)
			if err != nil {
				b.Fatal(err)
			}
			store := NewStore()
			store.Publish(table, policy.NewSet([]policy.Rule{{
				Name: "no-batch", DenySource: []spiffeid.ID{spiffeid.RequireFromString("spiffe://cluster.local/ns/demo/sa/batch")},
			}}))
			caller := spiffeid.RequireFromString("spiffe://cluster.local/ns/demo/sa/shop")
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				s := store.Load()
				a := addrs[i*7919%size]
				w, ok := s.Workloads.ByAddr(a)
				if !ok {
					b.Fatalf("nobody lives at %s", a)
				}
				v := s.Authorize(policy.Conn{Dir: policy.Outbound, Dst: netip.AddrPortFrom(a, 80), DstID: w.Identity(), SrcID: caller})
				if !v.Allow {
					b.Fatalf("denied by %s", v.Rule)
				}
			}
		})
	}
}
