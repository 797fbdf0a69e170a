// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// decisionPrefix is what the names in enum decision of bpf/culvert.h begin
// with.
const decisionPrefix = "DECISION_"

// readDecisions reads the names of decisions from the object's BTF.
func readDecisions(spec *ebpf.CollectionSpec) ([]string, error) {
	var e *btf.Enum
	if err := spec.Types.TypeByName("decision", &e); err != nil {
		return nil, fmt.Errorf("read names of decisions: %w", err)
	}
	var names []string
	for _, v := range e.Values {
		if name, ok := strings.CutPrefix(v.Name, decisionPrefix); ok {
			names = append(names, strings.ToLower(name))
		}
	}
	return names, nil
}

// Counters returns how often each decision was made and each failure met since
// the programs were first loaded, by name.
func (n *Node) Counters() map[string]uint64 {
	out := make(map[string]uint64, len(n.decisions))
	for i, name := range n.decisions {
		var perCPU []uint64
		if err := n.maps.Decisions.Lookup(uint32(i), &perCPU); err != nil {
			n.cfg.Logger.Error("read decision counter", "decision", name, "err", err)
			continue
		}
		var sum uint64
		for _, v := range perCPU {
			sum += v
		}
		out[name] = sum
	}
	return out
}

// checkCounters refuses a map of another layout.
func (n *Node) checkCounters() error {
	if got := n.maps.Decisions.MaxEntries(); got != uint32(len(n.decisions)) {
		return fmt.Errorf("map of decisions has %d rows, this version knows %d", got, len(n.decisions))
	}
	return nil
}
