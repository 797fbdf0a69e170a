// SPDX-License-Identifier: Apache-2.0

// Package pod says which pods of this node are to be enrolled, by values and the
// seam behind which they come from, and keeps each pod's life: the state machine
// of Keeper, which drives an Enroller. It opens no namespace and no socket itself.
// Sources are in folders of their own, static first.
package pod

import (
	"context"
	"net/netip"
	"slices"

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

// equal reports whether two descriptions are of one pod.
func (p *Pod) equal(q Pod) bool {
	return p.Key() == q.Key() && p.ServiceAccount == q.ServiceAccount && p.TrustDomain == q.TrustDomain &&
		p.NetnsPath == q.NetnsPath && slices.Equal(p.Addresses, q.Addresses)
}

// conflicts reports whether two pods cannot be at one time.
func (p *Pod) conflicts(q Pod) bool {
	return p.Key() == q.Key() || p.NetnsPath == q.NetnsPath ||
		slices.ContainsFunc(p.Addresses, func(a netip.Addr) bool { return slices.Contains(q.Addresses, a) })
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
