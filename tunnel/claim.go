// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/tunnel/hbone"
)

// maxName is how long a workload's or a namespace's name may be: a DNS subdomain
// (RFC 1123).
const maxName = 253 // bytes

// claim is the source workload's name as its node says, for the log of a
// connection whose address is nobody's that we know. Of its namespace only what
// its identity proves is believed; otherwise there is no name.
func claim(b hbone.Baggage, id spiffeid.ID) (workload, namespace string) {
	workload = b.Workload
	if workload == "" {
		workload = b.Pod
	}
	if workload == "" || len(workload) > maxName || b.Namespace == "" || len(b.Namespace) > maxName ||
		strings.Contains(b.Namespace, "/") || !strings.HasPrefix(id.Path(), "/ns/"+b.Namespace+"/") {
		return "", ""
	}
	return workload, b.Namespace
}
