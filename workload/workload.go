// SPDX-License-Identifier: Apache-2.0

// Package workload says who lives at which address: the members of the mesh,
// with the identity that each is known to have. It holds values only: it neither
// watches a source (package snapshot publishes what a source has read) nor knows
// which workloads run on this node (package pod does).
package workload

import (
	"fmt"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Protocol is how a workload is reached.
type Protocol uint8

// The protocols.
const (
	HBONE Protocol = iota // through the tunnel
	TCP                   // in plaintext: it has no tunnel at its end
)

func (p Protocol) String() string {
	switch p {
	case HBONE:
		return "hbone"
	case TCP:
		return "tcp"
	}
	return fmt.Sprintf("protocol(%d)", uint8(p))
}

// Workload is one member of the mesh.
type Workload struct {
	UID            string // unique in the mesh; namespace/name where nothing else is given
	Name           string
	Namespace      string
	ServiceAccount string
	TrustDomain    string
	Node           string // empty when it is not known
	Addresses      []netip.Addr
	Protocol       Protocol

	id spiffeid.ID // what Identity returns; set in a Table only
}

// Identity is spiffe://<trust domain>/ns/<namespace>/sa/<service account>. It is
// zero when these do not make a SPIFFE ID; a Table holds no such workload, and
// its workloads have their identity at hand.
func (w *Workload) Identity() spiffeid.ID {
	if !w.id.IsZero() {
		return w.id
	}
	id, err := MakeIdentity(w.TrustDomain, w.Namespace, w.ServiceAccount)
	if err != nil {
		return spiffeid.ID{}
	}
	return id
}

// MakeIdentity is the SPIFFE ID of a service account, in the form of Istio.
func MakeIdentity(trustDomain, namespace, serviceAccount string) (spiffeid.ID, error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("make identity of trust domain %q: %w", trustDomain, err)
	}
	id, err := spiffeid.FromSegments(td, "ns", namespace, "sa", serviceAccount)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("make identity of namespace %q, service account %q: %w", namespace, serviceAccount, err)
	}
	return id, nil
}
