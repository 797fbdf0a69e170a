// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// BenchmarkParseFile is what a reload of the workloads of a large mesh costs, up to
// the table.
func BenchmarkParseFile(b *testing.B) {
	var s strings.Builder
	s.WriteString("workloads:\n")
	for i := range 100_000 {
		fmt.Fprintf(&s, "  - name: web-%d\n    namespace: team-%d\n    serviceAccount: web\n    addresses: [10.%d.%d.%d, \"fd00:1::%x:%x\"]\n    node: node-%d\n",
			i, i%500, i>>16, i>>8&255, i&255, i>>16, i&0xffff, i%2000)
	}
	data := []byte(s.String())
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		list, err := ParseFile("w.yaml", data, spiffeid.RequireTrustDomainFromString("cluster.local"))
		if err != nil {
			b.Fatal(err)
		}
		if table, err := NewTable(list); err != nil || table.Len() != 100_000 {
			b.Fatalf("%d workloads, %v", table.Len(), err)
		}
	}
}
