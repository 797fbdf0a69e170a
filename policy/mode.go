// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Mode is what happens to plaintext that arrives for a workload, as in Istio's
// PeerAuthentication.
type Mode string

// The modes.
const (
	Strict     Mode = "strict"     // refused
	Permissive Mode = "permissive" // let in beside mutual TLS
)

// RuleDefaultMode is the mode rule that no file has: the mesh's own.
const RuleDefaultMode = "default-mode"

// ModeRule is the mode of a workload, of a namespace, or of the mesh. The most
// specific one that says something decides; within it, a port's own mode does.
type ModeRule struct {
	Name      string          // unique among the rules of both kinds
	Namespace string          // empty: the mesh
	Workload  string          // empty: all of the namespace
	Mode      Mode            // empty: that of the next wider rule
	Ports     map[uint16]Mode // those that differ; of a workload's rule only
}

// String says it as a listing does: "demo/web: permissive, 8080 strict (legacy)".
func (r ModeRule) String() string {
	var b strings.Builder
	switch {
	case r.Workload != "":
		fmt.Fprintf(&b, "%s/%s: ", r.Namespace, r.Workload)
	case r.Namespace != "":
		fmt.Fprintf(&b, "namespace %s: ", r.Namespace)
	default:
		b.WriteString("the mesh: ")
	}
	said := []string{}
	if r.Mode != "" {
		said = append(said, string(r.Mode))
	}
	for _, port := range slices.Sorted(maps.Keys(r.Ports)) {
		said = append(said, fmt.Sprintf("%d %s", port, r.Ports[port]))
	}
	fmt.Fprintf(&b, "%s (%s)", strings.Join(said, ", "), r.Name)
	return b.String()
}

// DefaultMode is the rule of a mesh for which no file has one.
func DefaultMode(m Mode) ModeRule { return ModeRule{Name: RuleDefaultMode, Mode: m} }

// scope is whom a mode rule is for. The zero scope is the mesh.
type scope struct{ namespace, workload string }

func (r *ModeRule) scope() scope { return scope{r.Namespace, r.Workload} }

// setModes takes the rules. Of two for the same scope the later one stands, so
// that a file's rule for the mesh takes the default's place.
func (s *Set) setModes(rules []ModeRule) {
	s.modes = make(map[scope]ModeRule, len(rules))
	for _, r := range rules {
		r.Ports = maps.Clone(r.Ports)
		s.modes[r.scope()] = r
	}
}

// Modes returns the mode rules, the widest first.
func (s *Set) Modes() []ModeRule {
	if s == nil {
		return nil
	}
	out := slices.SortedFunc(maps.Values(s.modes), func(a, b ModeRule) int {
		x, y := a.scope(), b.scope()
		return slices.Compare([]string{x.namespace, x.workload}, []string{y.namespace, y.workload})
	})
	for i := range out {
		out[i].Ports = maps.Clone(out[i].Ports)
	}
	return out
}

// Mode returns the mode of a workload's port, and the rule that says so. It is
// Strict where nothing says otherwise, and of a nil Set.
func (s *Set) Mode(namespace, workload string, port uint16) (m Mode, rule string) {
	if s == nil {
		return Strict, RuleNone
	}
	for _, at := range scopes(namespace, workload) {
		r, ok := s.modes[at]
		if !ok {
			continue
		}
		if m, ok := r.Ports[port]; ok {
			return m, r.Name
		}
		if r.Mode != "" {
			return r.Mode, r.Name
		}
	}
	return Strict, RuleDefaultMode
}

// scopes are those that a workload is in, the narrowest first.
func scopes(namespace, workload string) [3]scope {
	return [...]scope{{namespace, workload}, {namespace: namespace}, {}}
}

// PlainPorts are the ports on which a workload takes plaintext: Ports, or, with
// All, every port but those. The zero value is none.
type PlainPorts struct {
	All   bool
	Ports []uint16 // in order, each once
}

// PlainPorts returns the ports of a workload that are Permissive.
func (s *Set) PlainPorts(namespace, workload string) PlainPorts {
	if s == nil {
		return PlainPorts{}
	}
	// Port 0 is nobody's, so that it has the mode of the ports that are not named.
	rest, _ := s.Mode(namespace, workload, 0)
	out := PlainPorts{All: rest == Permissive}
	for port := range s.modes[scope{namespace, workload}].Ports {
		if m, _ := s.Mode(namespace, workload, port); m != rest {
			out.Ports = append(out.Ports, port)
		}
	}
	slices.Sort(out.Ports)
	return out
}

// Both returns the ports that are in p and in q: what may be taken in plaintext
// while a change from one to the other is under way.
func (p PlainPorts) Both(q PlainPorts) PlainPorts {
	var out PlainPorts
	switch {
	case p.All && q.All:
		out.All = true
		out.Ports = slices.Concat(p.Ports, q.Ports)
	case q.All:
		return q.Both(p)
	case p.All:
		out.Ports = slices.DeleteFunc(slices.Clone(q.Ports), func(n uint16) bool { return slices.Contains(p.Ports, n) })
	default:
		out.Ports = slices.DeleteFunc(slices.Clone(p.Ports), func(n uint16) bool { return !slices.Contains(q.Ports, n) })
	}
	slices.Sort(out.Ports)
	out.Ports = slices.Compact(out.Ports)
	return out
}

// Equal reports whether two are the same ports.
func (p PlainPorts) Equal(q PlainPorts) bool { return p.All == q.All && slices.Equal(p.Ports, q.Ports) }

// EvaluatePlain decides about a connection that arrives in plaintext for a
// workload: its mode has to be Permissive, and then no rule may deny it. Rules
// know sources by their identity, and it has none.
func EvaluatePlain(s *Set, namespace, workload string, c Conn) Verdict {
	mode, rule := s.Mode(namespace, workload, c.Dst.Port())
	if mode != Permissive {
		return Verdict{Rule: rule}
	}
	if v := Evaluate(s, c); !v.Allow {
		return v
	}
	return Verdict{Allow: true, Rule: rule}
}
