// SPDX-License-Identifier: Apache-2.0

// Package policy decides whether a connection may be, and whether in plaintext: a
// pure function of a set of rules and of the connection. As in Istio's AuthorizationPolicy, rules hold
// at the connection's destination; its source asks too, for the verdict that a
// connection is logged with, and is allowed. It knows neither workloads nor
// sockets, and it does not enforce: the tunnel does.
package policy

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Direction is the side of a connection at which it is decided.
type Direction uint8

// The directions.
const (
	Outbound Direction = iota // at the source
	Inbound                   // at the destination
)

func (d Direction) String() string {
	switch d {
	case Outbound:
		return "outbound"
	case Inbound:
		return "inbound"
	}
	return fmt.Sprintf("direction(%d)", uint8(d))
}

// Conn is what a decision may depend on. An identity is zero where the peer has
// proven none.
type Conn struct {
	Src, Dst     netip.AddrPort
	SrcID, DstID spiffeid.ID
	Dir          Direction
}

// Verdict is a decision and what it rests on.
type Verdict struct {
	Allow   bool
	Rule    string // the rule that decided, or one of the constants below
	Version uint64 // of the snapshot that was asked; 0 from Evaluate itself
}

// The rules that no file has.
const (
	RuleDefaultAllow = "default-allow" // no rule denies
	RuleNone         = "no-policy"     // nothing has been loaded yet: denied
)

// Rule denies connections.
type Rule struct {
	Name       string        // unique in its set
	DenySource []spiffeid.ID // identities from which nothing is taken
}

// Set is rules and modes. It never changes.
type Set struct {
	rules []Rule
	modes map[scope]ModeRule
}

// NewSet copies the rules and the modes. No rules allow everything, and no modes
// are Strict. Of two modes of the same scope the later one stands.
func NewSet(rules []Rule, modes ...ModeRule) *Set {
	s := &Set{rules: slices.Clone(rules)}
	s.setModes(modes)
	for i := range s.rules {
		s.rules[i].DenySource = slices.Clone(s.rules[i].DenySource)
	}
	return s
}

// Evaluate decides. The first rule that denies is named. A nil Set denies: it
// means that nothing has been loaded, and not that nothing is forbidden.
func Evaluate(s *Set, c Conn) Verdict {
	if s == nil {
		return Verdict{Rule: RuleNone}
	}
	if c.Dir == Outbound {
		return Verdict{Allow: true, Rule: RuleDefaultAllow}
	}
	for i := range s.rules {
		if slices.Contains(s.rules[i].DenySource, c.SrcID) {
			return Verdict{Rule: s.rules[i].Name}
		}
	}
	return Verdict{Allow: true, Rule: RuleDefaultAllow}
}
