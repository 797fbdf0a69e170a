// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/pod/static"
	"github.com/culvert-mesh/culvert/workload"
)

// What a daemon without pods says can be copied into its files as it stands.
func TestNoPodsHint(t *testing.T) {
	hint := noPodsHint("/etc/culvert/pods.yaml", "/etc/culvert/workloads.yaml")
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	_, rest, _ := strings.Cut(hint, "pods.yaml, such as: ")
	pods, rest, _ := strings.Cut(rest, ", and the workloads of all nodes in /etc/culvert/workloads.yaml: ")
	workloads, _, _ := strings.Cut(rest, "; they are")
	if list, err := static.ParseFile("pods.yaml", []byte(pods), td); err != nil || len(list) != 1 {
		t.Errorf("%v of %q: %v", list, pods, err)
	}
	if list, err := workload.ParseFile("workloads.yaml", []byte(workloads), td); err != nil || len(list) != 1 {
		t.Errorf("%v of %q: %v", list, workloads, err)
	}
}
