// SPDX-License-Identifier: Apache-2.0

// Package snapshot joins what the data plane decides from, workloads and policy,
// into one immutable value with a version. Producers publish to a Store, and
// event loops load from it; it reads no files and knows nobody who does.
package snapshot

import (
	"sync"
	"sync/atomic"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/workload"
)

// Snapshot is the state of the mesh at one time. It never changes.
type Snapshot struct {
	Version   uint64 // 0: nothing has been published, and everything is denied
	Workloads *workload.Table
	Policy    *policy.Set
}

// Authorize decides about a connection by this snapshot's policy.
func (s *Snapshot) Authorize(c policy.Conn) policy.Verdict {
	v := policy.Evaluate(s.Policy, c)
	v.Version = s.Version
	return v
}

// AuthorizePlain decides about a connection that arrives in plaintext for a
// workload, by its mode and then by the policy.
func (s *Snapshot) AuthorizePlain(namespace, workload string, c policy.Conn) policy.Verdict {
	v := policy.EvaluatePlain(s.Policy, namespace, workload, c)
	v.Version = s.Version
	return v
}

// Store holds the current snapshot.
type Store struct {
	current atomic.Pointer[Snapshot]

	mu      sync.Mutex    // orders Publish
	changed chan struct{} // guarded by mu
}

// NewStore starts with a snapshot of version 0, which knows nobody and denies.
func NewStore() *Store {
	s := &Store{changed: make(chan struct{})}
	s.current.Store(&Snapshot{})
	return s
}

// Load returns the current snapshot, never nil. It takes no lock.
func (s *Store) Load() *Snapshot { return s.current.Load() }

// Publish makes a new snapshot current and returns it. Versions count from 1.
func (s *Store) Publish(workloads *workload.Table, rules *policy.Set) *Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := &Snapshot{
		Version:   s.current.Load().Version + 1,
		Workloads: workloads,
		Policy:    rules,
	}
	s.current.Store(next)
	close(s.changed)
	s.changed = make(chan struct{})
	return next
}

// Changed returns a channel that is closed at the next Publish. To miss none,
// take the channel before Load.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}
