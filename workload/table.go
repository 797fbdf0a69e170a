// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
)

// Table finds workloads by address. It never changes; its methods are safe for
// concurrent use, and a nil Table is an empty one.
type Table struct {
	all    []Workload
	byAddr map[netip.Addr]*Workload
}

// NewTable copies the workloads. It refuses a UID or an address that two of them
// have, and fields that make no SPIFFE ID: an identity that is zero would later
// mean that any peer is as good as another.
func NewTable(list []Workload) (*Table, error) {
	t := &Table{
		all:    slices.Clone(list),
		byAddr: make(map[netip.Addr]*Workload, len(list)),
	}
	byUID := make(map[string]*Workload, len(list))
	for i := range t.all {
		w := &t.all[i]
		if err := t.add(w, byUID); err != nil {
			return nil, fmt.Errorf("add workload %s/%s: %w", w.Namespace, w.Name, err)
		}
	}
	return t, nil
}

func (t *Table) add(w *Workload, byUID map[string]*Workload) error {
	id, err := MakeIdentity(w.TrustDomain, w.Namespace, w.ServiceAccount)
	if err != nil {
		return err
	}
	w.id = id
	if w.UID == "" {
		return errors.New("it has no UID")
	}
	if other, twice := byUID[w.UID]; twice {
		return fmt.Errorf("UID %s is also that of %s/%s", w.UID, other.Namespace, other.Name)
	}
	byUID[w.UID] = w
	w.Addresses = slices.Clone(w.Addresses)
	for i, a := range w.Addresses {
		a = a.Unmap()
		w.Addresses[i] = a
		if other, twice := t.byAddr[a]; twice {
			return fmt.Errorf("address %s is also that of %s/%s", a, other.Namespace, other.Name)
		}
		t.byAddr[a] = w
	}
	return nil
}

// ByAddr finds the workload that has an address; a v4-mapped one counts as IPv4.
// The Workload belongs to the Table: do not change it.
func (t *Table) ByAddr(a netip.Addr) (*Workload, bool) {
	if t == nil {
		return nil, false
	}
	w, ok := t.byAddr[a.Unmap()]
	return w, ok
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
			if !yield(&t.all[i]) {
				return
			}
		}
	}
}
