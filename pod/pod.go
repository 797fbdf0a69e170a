// SPDX-License-Identifier: Apache-2.0

// Package pod says which pods of this node are to be enrolled, by values and the
// seam behind which they come from. It enrols nothing and opens no namespace.
// Sources are in folders of their own, static first.
package pod

import (
	"context"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/workload"
)

// Pod is one pod of this node.
type Pod struct {
	Name           string
	Namespace      string
	UID            string // empty where the source has none
	ServiceAccount string
	TrustDomain    string
	NetnsPath      string       // such as /run/netns/web or /proc/4711/ns/net
	Addresses      []netip.Addr // primary ones: at most one of each family
}

// Key tells pods apart, also a pod from its successor of the same name where
// UIDs are known. It is namespace_name or namespace_name_uid, as the kubelet
// names log folders: good as a file name, since names have no underscore.
func (p *Pod) Key() string {
	key := p.Namespace + "_" + p.Name
	if p.UID != "" {
		key += "_" + p.UID
	}
	return key
}

// Identity is the pod's SPIFFE ID; zero when the fields make none. A Source
// delivers no such pod.
func (p *Pod) Identity() spiffeid.ID {
	id, err := workload.MakeIdentity(p.TrustDomain, p.Namespace, p.ServiceAccount)
	if err != nil {
		return spiffeid.ID{}
	}
	return id
}

// Source knows the pods of this node.
type Source interface {
	// Pods returns all of them, of which each Key is there once. It may wait
	// for the first answer of what is behind it.
	Pods(ctx context.Context) ([]Pod, error)
	// Changed returns a channel that is closed when Pods may answer otherwise.
	// To miss nothing, take the channel before calling Pods.
	Changed() <-chan struct{}
}
