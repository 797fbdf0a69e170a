// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Table finds workloads by address. It never changes; its methods are safe for
// concurrent use, and a nil Table is an empty one.
type Table struct {
	all    []entry
	byAddr map[netip.Addr]*entry
	byUID  map[string]*entry
}

// entry keeps the identity, which would otherwise be made per connection.
type entry struct {
	Workload
	id spiffeid.ID
}

// NewTable copies the workloads. It refuses a UID or an address that two of them
// have, and fields that make no SPIFFE ID: an identity that is zero would later
// mean that any peer is as good as another.
func NewTable(list []Workload) (*Table, error) {
	t := &Table{
		all:    make([]entry, len(list)),
		byAddr: make(map[netip.Addr]*entry, len(list)),
		byUID:  make(map[string]*entry, len(list)),
	}
	for i, w := range list {
		e := &t.all[i]
		e.Workload = w
		e.Addresses = slices.Clone(w.Addresses)
		id, err := w.identity()
		if err != nil {
			return nil, fmt.Errorf("add workload %s/%s: %w", w.Namespace, w.Name, err)
		}
		e.id = id
		if w.UID == "" {
			return nil, fmt.Errorf("add workload %s/%s: %w", w.Namespace, w.Name, errNoUID)
		}
		if other, twice := t.byUID[w.UID]; twice {
			return nil, fmt.Errorf("add workload %s/%s: UID %s is also that of %s/%s", w.Namespace, w.Name, w.UID, other.Namespace, other.Name)
		}
		t.byUID[w.UID] = e
		for j, a := range e.Addresses {
			a = a.Unmap()
			e.Addresses[j] = a
			if other, twice := t.byAddr[a]; twice {
				return nil, fmt.Errorf("add workload %s/%s: address %s is also that of %s/%s", w.Namespace, w.Name, a, other.Namespace, other.Name)
			}
			t.byAddr[a] = e
		}
	}
	return t, nil
}

var errNoUID = errors.New("it has no UID")

// ByAddr finds the workload that has an address; a v4-mapped one counts as IPv4.
// The Workload belongs to the Table: do not change it.
func (t *Table) ByAddr(a netip.Addr) (*Workload, bool) {
	if t == nil {
		return nil, false
	}
	e, ok := t.byAddr[a.Unmap()]
	if !ok {
		return nil, false
	}
	return &e.Workload, true
}

// ByUID finds a workload by its UID.
func (t *Table) ByUID(uid string) (*Workload, bool) {
	if t == nil {
		return nil, false
	}
	e, ok := t.byUID[uid]
	if !ok {
		return nil, false
	}
	return &e.Workload, true
}

// Identity is the identity that the workload at an address is known to have,
// without making it anew. It is never zero when ok.
func (t *Table) Identity(a netip.Addr) (id spiffeid.ID, ok bool) {
	if t == nil {
		return spiffeid.ID{}, false
	}
	e, ok := t.byAddr[a.Unmap()]
	if !ok {
		return spiffeid.ID{}, false
	}
	return e.id, true
}

// Len is the number of workloads.
func (t *Table) Len() int {
	if t == nil {
		return 0
	}
	return len(t.all)
}

// All goes through the workloads in the order in which they were given.
func (t *Table) All() iter.Seq[*Workload] {
	return func(yield func(*Workload) bool) {
		if t == nil {
			return
		}
		for i := range t.all {
			if !yield(&t.all[i].Workload) {
				return
			}
		}
	}
}
