// SPDX-License-Identifier: Apache-2.0

package istio

import (
	"encoding/json"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// Mesh is what a ztunnel is told of the mesh.
type Mesh struct {
	Pods []*lab.Pod
	// Accounts has the service accounts of pods that are not taken to have
	// their own.
	Accounts map[*lab.Pod]string
	// Denied are ports that nobody may reach, at any pod.
	Denied []uint16
}

type (
	object = map[string]any
	list   = []any
)

func (m Mesh) account(p *lab.Pod) string {
	if a, ok := m.Accounts[p]; ok {
		return a
	}
	return p.ServiceAccount
}

func uid(p *lab.Pod) string { return cluster + "//Pod/" + p.Namespace + "/" + p.Name }

const cluster = "Kubernetes"

// JSON is what the file of a ztunnel without a control plane holds; it is read as
// YAML.
func (m Mesh) JSON() []byte {
	workloads, policies := list{}, list{}
	for _, p := range m.Pods {
		workloads = append(workloads, object{
			"uid": uid(p), "name": p.Name, "namespace": p.Namespace, "serviceAccount": m.account(p),
			"trustDomain": lab.TrustDomain, "node": p.Node.Name, "workloadIps": p.Addrs(), "protocol": "HBONE",
			"network": "", "clusterId": cluster, "services": object{},
		})
	}
	if len(m.Denied) > 0 {
		policies = append(policies, object{
			"name": "denied", "namespace": "", "scope": "Global", "action": "Deny", "dryRun": false,
			"rules": list{list{list{object{"destinationPorts": m.Denied}}}},
		})
	}
	b, err := json.Marshal(object{"workloads": workloads, "policies": policies, "services": list{}})
	if err != nil {
		panic(err) // of strings, numbers and addresses
	}
	return b
}

// Environment is that of a node's ztunnel, but for where its certificates come
// from. file holds what JSON returns.
func (a *Agent) Environment(n *lab.Node, file string) []string {
	return []string{
		"PROXY_MODE=shared", "INPOD_ENABLED=true", "INPOD_UDS=" + a.path, "NODE_NAME=" + n.Name, "CLUSTER_ID=" + cluster,
		"LOCAL_XDS_PATH=" + file, "XDS_ADDRESS=", "FAKE_CA=false",
	}
}
