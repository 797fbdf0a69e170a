// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/culvert-mesh/culvert/bpf"
)

// PlainPorts says on which ports of its mesh addresses a pod takes plaintext
// from outside. The zero value is STRICT: on none. The tunnel's own ports never
// take it.
type PlainPorts struct {
	All    bool     // on all ports but those of Except
	Except []uint16 // without All: nothing
	Only   []uint16 // on these; with All: nothing
}

// enum plain of bpf/culvert.h.
const (
	plainTaken   uint32 = 1
	plainRefused uint32 = 2
)

// anyPort is the row of the ports that have none of their own.
const anyPort = 0

// plainPort is struct plain_port of bpf/culvert.h.
func plainPort(cookie uint64, port uint16) bpf.ConnectPlainPort {
	return bpf.ConnectPlainPort{Cookie: cookie, Port: uint32(port)}
}

func (p PlainPorts) rows() (map[uint16]uint32, error) {
	rows := map[uint16]uint32{}
	ports, value := p.Only, plainTaken
	if p.All {
		rows[anyPort] = plainTaken
		ports, value = p.Except, plainRefused
	}
	for _, port := range ports {
		if port == anyPort {
			return nil, errors.New("0 is no port")
		}
		rows[port] = value
	}
	return rows, nil
}

// SetPlainPorts says where the pod takes plaintext: there it is given to the
// listener of Inbound4 or Inbound6, and refused while there is none. What an
// earlier process has set is in force until the first call. Meanwhile, and where
// it fails halfway, no port takes plaintext that did not before and is not to.
// Live connections are not touched.
func (p *Pod) SetPlainPorts(ports PlainPorts) error {
	want, err := ports.rows()
	if err == nil {
		err = p.n.setPlainPorts(p.cfg.NS.Cookie(), want)
	}
	if err != nil {
		return fmt.Errorf("steer pod %s: set ports that take plaintext: %w", p.cfg.Name, err)
	}
	return nil
}

func (n *Node) setPlainPorts(cookie uint64, want map[uint16]uint32) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.readPlainPorts(); err != nil {
		return err
	}
	have := n.plain[cookie]
	if have == nil {
		have = map[uint16]uint32{}
		n.plain[cookie] = have
	}
	put := func(port uint16, value uint32) error {
		if have[port] == value {
			return nil
		}
		if err := n.maps.PlainPorts.Put(plainPort(cookie, port), value); err != nil {
			return full(err, n.maps.PlainPorts, "ports with a mode of their own on a node")
		}
		have[port] = value
		return nil
	}
	remove := func(port uint16) error {
		if _, ok := have[port]; !ok {
			return nil
		}
		if err := n.maps.PlainPorts.Delete(plainPort(cookie, port)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		delete(have, port)
		return nil
	}
	// What becomes stricter: exceptions first, then the default that they are
	// exceptions from, then single ports, which fall back to it.
	for port, value := range want {
		if value == plainRefused {
			if err := put(port, value); err != nil {
				return err
			}
		}
	}
	if _, ok := want[anyPort]; !ok {
		if err := remove(anyPort); err != nil {
			return err
		}
	}
	for port, value := range have {
		if _, ok := want[port]; !ok && value == plainTaken {
			if err := remove(port); err != nil {
				return err
			}
		}
	}
	// What becomes looser.
	for port, value := range want {
		if err := put(port, value); err != nil {
			return err
		}
	}
	for port := range have {
		if _, ok := want[port]; !ok {
			if err := remove(port); err != nil {
				return err
			}
		}
	}
	if len(have) == 0 {
		delete(n.plain, cookie)
	}
	return nil
}

// readPlainPorts reads what is in the map once: an earlier process may have left
// it. The caller holds mu.
func (n *Node) readPlainPorts() error {
	if n.plain != nil {
		return nil
	}
	all := map[uint64]map[uint16]uint32{}
	var key bpf.ConnectPlainPort
	var value uint32
	it := n.maps.PlainPorts.Iterate()
	for it.Next(&key, &value) {
		if all[key.Cookie] == nil {
			all[key.Cookie] = map[uint16]uint32{}
		}
		all[key.Cookie][uint16(key.Port)] = value
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read ports that take plaintext: %w", err)
	}
	n.plain = all
	return nil
}
