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

// Foreign is a program of somebody else's at a hook of ours.
type Foreign struct {
	Hook string // connect4, connect6
	Name string
	ID   ebpf.ProgramID
}

// ForeignMend is what can be done about the programs of a load balancer in sockets.
const ForeignMend = "have it leave pods' namespaces alone; Cilium: socketLB.hostNamespaceOnly=true"

// ForeignPrograms lists the programs that run beside ours when a process below a
// cgroup, named as Config.Cgroup, connects.
func ForeignPrograms(cgroup string) ([]Foreign, error) {
	dir, _, err := FindCgroup(cgroup)
	if err != nil {
		return nil, err
	}
	var out []Foreign
	for i, hook := range hooks {
		if attachTypes[i] == ebpf.AttachCGroupSetsockopt {
			continue // a refusal there is not undone by others
		}
		found, err := effective(dir, attachTypes[i])
		if err != nil {
			return nil, err
		}
		for _, id := range found {
			if name, ok := foreign(id); ok {
				out = append(out, Foreign{hook, name, id})
			}
		}
	}
	return out, nil
}

// effective lists the programs that are in force at a cgroup, in their order.
func effective(dir string, attach ebpf.AttachType) ([]ebpf.ProgramID, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("look at the hooks' cgroup: %w", err)
	}
	defer f.Close()
	found, err := query(link.QueryOptions{Target: int(f.Fd()), Attach: attach, QueryFlags: queryEffective})
	if err != nil {
		return nil, fmt.Errorf("look at the hooks of %s: %w", dir, err)
	}
	return found, nil
}

func query(o link.QueryOptions) (ids []ebpf.ProgramID, err error) {
	found, err := link.QueryPrograms(o)
	if err != nil {
		return nil, err
	}
	for _, p := range found.Programs {
		ids = append(ids, p.ID)
	}
	return ids, nil
}

// foreign names a program that is not Culvert's; one that has gone is no matter.
func foreign(id ebpf.ProgramID) (name string, ok bool) {
	name, err := programName(id)
	return name, err == nil && !slices.Contains(ownPrograms, name)
}

// checkHooks looks whether the hooks are in force where they were attached, and
// warns of programs that run after them: what a connect hook has refused they can
// let pass, and they can give a connection another destination.
func (n *Node) checkHooks() error {
	for i, l := range n.links {
		id, err := programOf(l)
		if err != nil {
			return err
		}
		found, err := effective(n.cgroupDir, attachTypes[i])
		if err != nil {
			return err
		}
		at := slices.Index(found, id)
		if at < 0 {
			return fmt.Errorf("the hook %s is not attached to the cgroup %s any more: start ztunnel again", hooks[i], n.cgroupDir)
		}
		if attachTypes[i] == ebpf.AttachCGroupSetsockopt {
			continue // a refusal there is not undone by others
		}
		for _, p := range found[at+1:] {
			n.warnOf(hooks[i], p)
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
	name, ok := foreign(id)
	if !ok {
		return
	}
	n.cfg.Logger.Warn("another program runs after ours when a pod connects: a load balancer in sockets would send it elsewhere than was decided",
		"hook", hook, "program", name, "id", uint32(id), "cgroup", n.cgroupDir, "hint", ForeignMend)
}
