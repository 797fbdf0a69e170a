// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/workload"
)

func TestStoreDeniesUntilSomethingIsPublished(t *testing.T) {
	s := NewStore()
	if v := s.Load().Authorize(policy.Conn{Dir: policy.Inbound}); v != (policy.Verdict{Rule: policy.RuleNone}) {
		t.Errorf("got %+v", v)
	}
	if n := s.Load().Workloads.Len(); n != 0 {
		t.Errorf("it knows %d workloads", n)
	}
}

func TestVerdictNamesRuleAndVersion(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://cluster.local/ns/demo/sa/batch")
	s := NewStore()
	s.Publish(nil, policy.NewSet(nil))
	first := s.Load()
	s.Publish(nil, policy.NewSet([]policy.Rule{{Name: "no-batch", DenySource: []spiffeid.ID{id}}}))

	conn := policy.Conn{Dir: policy.Inbound, SrcID: id}
	if got, want := first.Authorize(conn), (policy.Verdict{Allow: true, Rule: policy.RuleDefaultAllow, Version: 1}); got != want {
		t.Errorf("the first snapshot: %+v, want %+v", got, want)
	}
	if got, want := s.Load().Authorize(conn), (policy.Verdict{Rule: "no-batch", Version: 2}); got != want {
		t.Errorf("the second snapshot: %+v, want %+v", got, want)
	}
}

func TestChangedIsClosedAtPublish(t *testing.T) {
	s := NewStore()
	changed := s.Changed()
	select {
	case <-changed:
		t.Fatal("closed before anything has changed")
	default:
	}
	table, err := workload.NewTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Publish(table, policy.NewSet(nil)); got != s.Load() || got.Version != 1 || got.Workloads != table {
		t.Errorf("published %+v", got)
	}
	select {
	case <-changed:
	default:
		t.Fatal("not closed")
	}
	select {
	case <-s.Changed():
		t.Fatal("the next channel is closed already")
	default:
	}
}

func TestVersionsCountEachPublish(t *testing.T) {
	const producers, each = 4, 50
	s := NewStore()
	var wg sync.WaitGroup
	for range producers {
		wg.Go(func() {
			for range each {
				s.Publish(nil, policy.NewSet(nil))
				s.Load()
			}
		})
	}
	wg.Wait()
	if got := s.Load().Version; got != producers*each {
		t.Errorf("version %d after %d publishes", got, producers*each)
	}
}
