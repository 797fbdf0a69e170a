// SPDX-License-Identifier: Apache-2.0

package istio

import (
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// What a ztunnel reads of the mesh: it takes no file in which a workload lacks its
// services.
func TestMesh(t *testing.T) {
	pod := func(name string) *lab.Pod {
		return &lab.Pod{
			Name: name, Namespace: "demo", ServiceAccount: "of-" + name, Node: &lab.Node{Name: "node1"},
			V4: netip.MustParseAddr("10.77.1.11"), V6: netip.MustParseAddr("fd77::1:1"),
		}
	}
	one, other := pod("one"), pod("other")
	var got object
	if err := json.Unmarshal(Mesh{Pods: []*lab.Pod{one, other}, Accounts: map[*lab.Pod]string{other: "somebody"}, Denied: []uint16{8401}}.JSON(), &got); err != nil {
		t.Fatal(err)
	}
	workload := func(name, account string) object {
		return object{
			"uid": "Kubernetes//Pod/demo/" + name, "name": name, "namespace": "demo", "serviceAccount": account,
			"trustDomain": lab.TrustDomain, "node": "node1", "workloadIps": list{"10.77.1.11", "fd77::1:1"},
			"protocol": "HBONE", "network": "", "clusterId": "Kubernetes", "services": object{},
		}
	}
	want := object{
		"services": list{}, "workloads": list{workload("one", "of-one"), workload("other", "somebody")},
		"policies": list{object{
			"name": "denied", "namespace": "", "scope": "Global", "action": "Deny", "dryRun": false,
			"rules": list{list{list{object{"destinationPorts": list{8401.0}}}}},
		}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
