// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"fmt"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config/strict"
)

// ParseFile reads data as the file at path:
//
//	workloads:
//	  - name: web                  # needed
//	    namespace: demo            # default: default
//	    serviceAccount: web        # default: default
//	    addresses: [10.0.1.7, fd00:1::7]   # one or more
//	    protocol: hbone            # or tcp; default: hbone
//	    trustDomain: cluster.local # default: trustDomain, the mesh's own
//	    node: node-1               # default: not known
//	    uid: 3b0c…                 # default: namespace/name
//
// A mistake is a *strict.Error.
func ParseFile(path string, data []byte, trustDomain spiffeid.TrustDomain) ([]Workload, error) {
	r := reader{
		trustDomain: trustDomain,
		uids:        map[string]int{},
		addrs:       map[netip.Addr]string{},
	}
	err := strict.Read(path, data, func(o *strict.Object) {
		o.Objects("workloads", r.read)
	})
	if err != nil {
		return nil, err
	}
	return r.list, nil
}

type reader struct {
	trustDomain spiffeid.TrustDomain
	list        []Workload
	uids        map[string]int        // the line of each
	addrs       map[netip.Addr]string // the owner of each
}

func (r *reader) read(o *strict.Object) {
	w := Workload{Namespace: "default", ServiceAccount: "default"}
	td := r.trustDomain
	protocol := HBONE.String()

	o.RequireName("name", &w.Name)
	o.Name("namespace", &w.Namespace)
	o.Name("serviceAccount", &w.ServiceAccount)
	o.TrustDomain("trustDomain", &td)
	o.Name("node", &w.Node)
	strict.Enum(o, "protocol", &protocol, HBONE.String(), TCP.String())
	if protocol == TCP.String() {
		w.Protocol = TCP
	}
	w.TrustDomain = td.Name()
	w.UID = w.Namespace + "/" + w.Name
	o.UID("uid", &w.UID)
	if line, twice := r.uids[w.UID]; twice {
		if o.Has("uid") {
			o.Fail("uid", "each UID once", "%q is also that of line %d", w.UID, line)
		} else {
			o.Fail("name", "each name once in a namespace, or a uid of its own", "%q is also that of line %d", w.UID, line)
		}
	}
	r.uids[w.UID] = o.Line("")

	o.RequireList("addresses", "one IP address or more")
	o.Addresses("addresses", &w.Addresses, func(a netip.Addr) error {
		if owner, twice := r.addrs[a]; twice {
			return &strict.Unfit{Problem: fmt.Sprintf("%s is also an address of %s", a, owner), Allowed: "an address that no other workload has"}
		}
		r.addrs[a] = w.UID
		return nil
	})
	r.list = append(r.list, w)
}
