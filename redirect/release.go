// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// Release takes away what AddPod and Enrol have set, goes on past errors, and
// may be called more than once. The pod's traffic is then what it was before.
func (p *Pod) Release() error {
	err := p.close()
	_, rerr := p.n.release(p.state, p.cfg.NS)
	p.n.disown(p)
	if err = errors.Join(err, rerr); err != nil {
		return fmt.Errorf("release pod %s: %w", p.cfg.Name, err)
	}
	return nil
}

// Leave closes the process's handles of the pod. What is pinned stays: the pod is
// refused until it is added again, here or by a later process.
func (p *Pod) Leave() error {
	err := errors.Join(p.close(), p.SetPlainPorts(PlainPorts{}))
	p.n.disown(p)
	return err
}

// Abandon takes back an AddPod after which the pod could not be served: a pod
// that was taken over stays refused, as it was found; another is released.
func (p *Pod) Abandon() error {
	if p.adopted {
		return p.Leave()
	}
	return p.Release()
}

// ReleaseOthers releases the pods that an earlier process has left and that
// have not been added since, but for those that keep names (nil: none); pods
// are known by name and by the path of their namespace. Until then they are
// refused.
func (n *Node) ReleaseOthers(keep func(name, netnsPath string) bool) (report []string, err error) {
	all, err := readStates(n.cfg.RunDir)
	errs := []error{err}
	for _, s := range all {
		n.mu.Lock()
		_, added := n.named(s.Name)
		n.mu.Unlock()
		if added || (keep != nil && keep(s.Name, s.NetnsPath)) {
			continue
		}
		done, err := n.release(s, nil)
		report = append(report, done...)
		errs = append(errs, err)
	}
	return report, errors.Join(errs...)
}

// release takes a pod away by what was written down of it; ns may be nil. What
// failed stays written down, for another try.
func (n *Node) release(s podState, ns *netns.NS) (report []string, err error) {
	if s.Name == "" {
		return nil, nil
	}
	var errs []error
	if err := n.maps.Enrolled.Delete(s.Cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		errs = append(errs, fmt.Errorf("remove from the enrolled: %w", err))
	}
	for slot := Outbound4; slot <= Inbound6; slot++ {
		if err := n.maps.Listeners.Delete(listener(s.Cookie, slot)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("remove listener: %w", err))
		}
	}
	if err := n.setPlainPorts(s.Cookie, nil); err != nil {
		errs = append(errs, fmt.Errorf("remove ports that take plaintext: %w", err))
	}
	if err := detach(filepath.Join(n.podPins(s.Name), steerPin)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	report, err = s.undo(ns)
	errs = append(errs, err)
	if err := os.RemoveAll(n.podPins(s.Name)); err != nil {
		errs = append(errs, fmt.Errorf("remove pins: %w", err))
	}
	if err := errors.Join(errs...); err != nil {
		return report, err
	}
	return report, s.remove(n.cfg.RunDir)
}
