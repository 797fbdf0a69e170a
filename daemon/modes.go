// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"sync"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/redirect"
)

// modes tells the kernel on which ports each enrolled pod takes plaintext. As with
// destinations, it is never told of more than the snapshot in force says: a change
// holds the lock from stricter to settle, with the new snapshot in between, and a
// pod that comes meanwhile waits.
type modes struct {
	sync.Mutex // guards what follows

	rules *policy.Set // those in force; nil: none yet, and nothing takes plaintext
	pods  map[*podMode]struct{}
}

// podMode is one pod.
type podMode struct {
	namespace, name string
	set             func(redirect.PlainPorts) error
	now             policy.PlainPorts // what the kernel was told last, and took
	unsure          bool              // it may have taken part of something since
}

// add tells the kernel of a pod, whatever it had been told before.
func (m *modes) add(namespace, name string, set func(redirect.PlainPorts) error) (*podMode, error) {
	m.Lock()
	defer m.Unlock()
	p := &podMode{namespace: namespace, name: name, set: set}
	want := m.rules.PlainPorts(namespace, name)
	if err := set(plainPorts(want)); err != nil {
		return nil, err
	}
	p.now = want
	if m.pods == nil {
		m.pods = map[*podMode]struct{}{}
	}
	m.pods[p] = struct{}{}
	return p, nil
}

// remove forgets a pod, before its steering goes. A nil one is none.
func (m *modes) remove(p *podMode) {
	m.Lock()
	defer m.Unlock()
	delete(m.pods, p)
}

// stricter shuts what is open and is not to be by next. The caller holds the lock.
func (m *modes) stricter(next *policy.Set) error {
	var errs []error
	for p := range m.pods {
		errs = append(errs, p.become(p.now.Both(next.PlainPorts(p.namespace, p.name))))
	}
	return errors.Join(errs...)
}

// settle makes the ports those of the rules, which are in force. Where it fails,
// a port is shut that might be open. The caller holds the lock.
func (m *modes) settle(rules *policy.Set) error {
	m.rules = rules
	var errs []error
	for p := range m.pods {
		errs = append(errs, p.become(rules.PlainPorts(p.namespace, p.name)))
	}
	return errors.Join(errs...)
}

func (p *podMode) become(want policy.PlainPorts) error {
	if p.now.Equal(want) && !p.unsure {
		return nil
	}
	err := p.set(plainPorts(want))
	if p.unsure = err != nil; err == nil {
		p.now = want
	}
	return err
}

func plainPorts(p policy.PlainPorts) redirect.PlainPorts {
	if p.All {
		return redirect.PlainPorts{All: true, Except: p.Ports}
	}
	return redirect.PlainPorts{Only: p.Ports}
}
