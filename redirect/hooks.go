// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// hooks are the names of the hooks' pins.
var hooks = [...]string{"connect4", "connect6", "setsockopt"}

// attachTypes are the hooks' attach types, in the same order.
var attachTypes = [...]ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupSetsockopt}

const attachLookup = ebpf.AttachSkLookup

// queryEffective has programs listed that are in force at a cgroup, those of its
// ancestors too, in the order in which they run (BPF_F_QUERY_EFFECTIVE).
const queryEffective = 1

// ownPrograms are the names of the hooks' programs, by which those of another
// instance on the machine are known: they do not undo anything.
var ownPrograms = []string{"capture4", "capture6", "keep"}

func programOf(l link.Link) (ebpf.ProgramID, error) {
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("look at a link: %w", err)
	}
	return info.Program, nil
}

// checkHooks looks whether the hooks are in force where they were attached, and
// warns of programs that run after them: what a connect hook has refused they can
// let pass, and they can give a connection another destination.
func (n *Node) checkHooks() error {
	dir, err := os.Open(n.cgroupDir)
	if err != nil {
		return fmt.Errorf("look at the hooks' cgroup: %w", err)
	}
	defer dir.Close()
	for i, l := range n.links {
		id, err := programOf(l)
		if err != nil {
			return err
		}
		found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: attachTypes[i], QueryFlags: queryEffective})
		if err != nil {
			return fmt.Errorf("look at the hooks of %s: %w", n.cgroupDir, err)
		}
		at := slices.IndexFunc(found.Programs, func(p link.AttachedProgram) bool { return p.ID == id })
		if at < 0 {
			return fmt.Errorf("the hook %s is not attached to the cgroup %s any more: start ztunnel again", hooks[i], n.cgroupDir)
		}
		if attachTypes[i] == ebpf.AttachCGroupSetsockopt {
			continue // a refusal there is not undone by others
		}
		for _, p := range found.Programs[at+1:] {
			n.warnOf(hooks[i], p.ID)
		}
	}
	return nil
}

// warnOf names a foreign program, once.
func (n *Node) warnOf(hook string, id ebpf.ProgramID) {
	n.mu.Lock()
	known := n.foreign[id]
	n.foreign[id] = true
	n.mu.Unlock()
	if known {
		return
	}
	name, err := programName(id)
	if err != nil || slices.Contains(ownPrograms, name) { // gone, or no matter
		return
	}
	n.cfg.Logger.Warn("another program runs after ours when a pod connects: a load balancer in sockets would send it elsewhere than was decided",
		"hook", hook, "program", name, "id", uint32(id), "cgroup", n.cgroupDir,
		"hint", "have it leave pods' namespaces alone; Cilium: socketLB.hostNamespaceOnly=true")
}
