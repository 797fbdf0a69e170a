// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// steerProgram is the name of the lookup program, by which another instance's is
// known.
const steerProgram = "steer"

// runPin is a symbolic link beside an instance's pins, to its run directory: what
// the name of the directory, a hash, does not tell.
const runPin = "run"

func pinRunDir(dir, runDir string) error {
	if err := os.Symlink(runDir, filepath.Join(dir, runPin)); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("note the run directory beside the pins: %w", err)
	}
	return nil
}

// RunDirs returns the run directories of this machine's instances, as far as they
// have pins where bpffs is by default.
func RunDirs() (out []string) {
	pins, _ := filepath.Glob(filepath.Join(defaultBPFFS, "culvert", "*", "*", runPin)) // the pattern is good
	for _, pin := range pins {
		if dir, err := os.Readlink(pin); err == nil {
			out = append(out, dir)
		}
	}
	return out
}

// lockWait is far longer than an instance has a namespace locked.
const lockWait = 2 * time.Second

// alone sets the pod up by f unless another instance has: with two, what one
// releases is the other's too, rules and sysctls among it. The namespace itself
// is locked meanwhile, by its inode, so that of two that begin at once one is
// first.
func (p *Pod) alone(ctx context.Context, f func() error) error {
	locked, err := p.lock(ctx)
	if err != nil {
		return fmt.Errorf("lock its namespace: %w", err)
	}
	if err = p.checkRivals(); err == nil {
		err = f()
	}
	if locked {
		if uerr := unix.Flock(p.cfg.NS.FD(), unix.LOCK_UN); uerr != nil {
			err = errors.Join(err, fmt.Errorf("unlock its namespace: %w", uerr))
		}
	}
	return err
}

// lock locks the namespace. Any process in it can do that too, and must not keep
// the pod in plaintext by it: after lockWait it goes on without.
func (p *Pod) lock(ctx context.Context) (locked bool, err error) {
	enough := time.NewTimer(lockWait)
	defer enough.Stop()
	tick := time.NewTicker(setUpPoll)
	defer tick.Stop()
	for {
		if err := unix.Flock(p.cfg.NS.FD(), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			return err == nil, err
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-enough.C:
			p.n.cfg.Logger.Warn("a process has the pod's network namespace locked (flock): it is enrolled all the same", "pod", p.cfg.Name)
			return false, nil
		case <-tick.C:
		}
	}
}

// checkRivals looks for a lookup program in the namespace that is not pinned as
// one of ours. That of a process that has ended before it was pinned goes with
// the process.
func (p *Pod) checkRivals() error {
	found, err := lookups(p.cfg.NS)
	if err != nil || len(found) == 0 {
		return err
	}
	var own []ebpf.ProgramID
	dirs := []string{p.dir}
	for _, old := range p.before {
		dirs = append(dirs, p.n.podPins(old.Name))
	}
	for _, dir := range dirs {
		id, err := pinnedProgram(filepath.Join(dir, steerPin))
		if err == nil {
			own = append(own, id)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, id := range found {
		if slices.Contains(own, id) {
			continue
		}
		if name, err := programName(id); err != nil || name != steerProgram {
			continue // gone; or somebody else's, who steers other sockets
		}
		where := p.n.runDirOf(id)
		if where == "" {
			where = "not known"
		}
		return fmt.Errorf("its namespace is enrolled by another instance of ztunnel (run directory: %s): take it off that one's pods; if it does not run any more, run `ztunnel cleanup` with its configuration", where)
	}
	return nil
}

// LookupPrograms names the programs that choose the listeners of a namespace's
// connections. enrolled says that one of them is Culvert's, whichever instance's.
func LookupPrograms(ns *netns.NS) (foreign []string, enrolled bool, err error) {
	found, err := lookups(ns)
	if err != nil {
		return nil, false, err
	}
	for _, id := range found {
		switch name, err := programName(id); {
		case err != nil: // gone
		case name == steerProgram:
			enrolled = true
		default:
			foreign = append(foreign, name)
		}
	}
	return foreign, enrolled, nil
}

// lookups lists those programs, in their order.
func lookups(ns *netns.NS) ([]ebpf.ProgramID, error) {
	found, err := query(link.QueryOptions{Target: ns.FD(), Attach: attachLookup})
	if err != nil {
		return nil, fmt.Errorf("look at the namespace's lookup programs: %w", err)
	}
	return found, nil
}

func programName(id ebpf.ProgramID) (string, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return "", err
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return "", err
	}
	return info.Name, nil
}

func pinnedProgram(pin string) (ebpf.ProgramID, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return 0, fmt.Errorf("look at %s: %w", pin, err)
	}
	defer l.Close()
	return programOf(l)
}

// runDirOf finds the instance that has pinned a lookup program, in the same
// bpffs; "": not there.
func (n *Node) runDirOf(id ebpf.ProgramID) string {
	pins, err := filepath.Glob(filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(n.pins))), "culvert", "*", "*", podsDir, "*", steerPin))
	if err != nil {
		return ""
	}
	for _, pin := range pins {
		if have, err := pinnedProgram(pin); err != nil || have != id {
			continue
		}
		dir, err := os.Readlink(filepath.Join(pin, "../../..", runPin))
		if err != nil {
			return ""
		}
		return dir
	}
	return ""
}
