// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

// Existing is a connection of a pod that the tunnel does not carry, though one
// that is made now would be carried or refused: it is older than the pod's
// enrolment, or than the address's place in the mesh, and goes on in plaintext.
type Existing struct {
	Inbound bool // a listener of the pod has accepted it
	Local   netip.AddrPort
	Remote  netip.AddrPort
	UID     uint32 // of its socket

	socket sockdiag.Socket
}

// Existing finds those of an enrolled pod, by what its sockets are, and not by
// what is remembered of them: a later process finds the same. What does not touch
// the mesh is not among them, nor what is plaintext by configuration (an address
// of a workload that says tcp, a bypassed one).
//
// A connect() that had passed the hook before the enrolment, and has not sent its
// SYN yet, is found by a later look only.
func (p *Pod) Existing() ([]Existing, error) {
	var look looked
	q := sockdiag.Query{States: sockdiag.Connected | sockdiag.Listening, Storage: p.n.maps.OwnSockets.FD()}
	if err := sockdiag.Each(p.cfg.NS, q, look.take); err != nil {
		return nil, fmt.Errorf("find connections of pod %s beside the tunnel: %w", p.cfg.Name, err)
	}
	return look.existing(p.isOwn, p.n.inMesh()), nil
}

// Reset ends one: its process gets ECONNABORTED, its peer a reset. It is no error
// that it has ended already. sockdiag.ErrNoDestroy: this kernel cannot.
func (p *Pod) Reset(e Existing) error { return sockdiag.Destroy(p.cfg.NS, e.socket) }

func (p *Pod) isOwn(a netip.Addr) bool { return a.IsValid() && (a == p.v4 || a == p.v6) }

// tuple is a connection as one of its ends has it.
type tuple struct{ local, remote netip.AddrPort }

// looked sorts a namespace's sockets.
type looked struct {
	candidates []sockdiag.Socket
	own        map[tuple]bool  // the tunnel's connections
	listening  map[uint16]bool // ports with a listener; true: the tunnel's
}

func (l *looked) take(s sockdiag.Socket) error {
	if l.own == nil {
		l.own, l.listening = map[tuple]bool{}, map[uint16]bool{}
	}
	switch {
	case s.State == unix.BPF_TCP_LISTEN:
		l.listening[s.Local.Port()] = s.Stored
	case s.Stored: // nobody but the tunnel can set that
		l.own[tuple{s.Local, s.Remote}] = true
	case s.Mark == mark:
		// The rule sends what has this mark to lo, whoever has set it: it
		// does not leave the pod.
	default:
		l.candidates = append(l.candidates, s)
	}
	return nil
}

// existing are those that leave the pod, or come from outside, and touch the mesh.
func (l *looked) existing(isOwn, inMesh func(netip.Addr) bool) []Existing {
	var out []Existing
	for _, s := range l.candidates {
		ours, listened := l.listening[s.Local.Port()]
		switch local, remote := s.Local.Addr(), s.Remote.Addr(); {
		case l.own[tuple{s.Remote, s.Local}]:
			// Its other end is the tunnel's: an application that marks what it
			// accepts by itself.
			continue
		case s.State == unix.BPF_TCP_SYN_RECV && ours:
			continue // the tunnel will accept it, and it is marked as the tunnel's then
		case local == remote, remote.IsLoopback(), isOwn(remote):
			continue // it stays in the pod
		case inMesh(remote):
		case listened && isOwn(local):
			// From outside the mesh, which would be refused at its SYN.
		default:
			continue
		}
		out = append(out, Existing{Inbound: listened, Local: s.Local, Remote: s.Remote, UID: s.UID, socket: s})
	}
	slices.SortFunc(out, func(a, b Existing) int {
		return cmp.Or(a.Local.Compare(b.Local), a.Remote.Compare(b.Remote))
	})
	// A dump of sockets that come and go may tell of one twice.
	return slices.CompactFunc(out, func(a, b Existing) bool { return a.socket.Cookie == b.socket.Cookie })
}

// inMesh says whether a connection to an address would be carried or refused, as
// decide in bpf/connect.c does.
func (n *Node) inMesh() func(netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	mesh, bypass := n.mesh, n.bypass
	contains := func(ranges []netip.Prefix, a netip.Addr) bool {
		return slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(a) })
	}
	return func(a netip.Addr) bool {
		if contains(bypass, a) {
			return false
		}
		n.mu.Lock()
		d, known := n.destinations[a]
		n.mu.Unlock()
		if known {
			return d != DestinationTCP
		}
		return contains(mesh, a)
	}
}
