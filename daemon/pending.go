// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"slices"
	"time"

	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/workload"
)

// How long is waited until the maps are tried again, at first and at most.
const (
	againAfter  = time.Second
	againAtMost = time.Minute
)

// pending is what was read and could not be put in force, because the kernel's
// maps could not be changed: no further change of a file is to be waited for.
type pending struct {
	table  *workload.Table // nil: none
	rules  *policy.Set     // nil: none
	settle bool            // the maps are stricter than the snapshot in force
	files  []string        // whose contents it is
	at     time.Time       // of the next try
	wait   time.Duration   // after that one
}

func (p *pending) none() bool { return p.table == nil && p.rules == nil && !p.settle }

// reported takes a file out of those that are told of when all is in force:
// something newer is said of it.
func (p *pending) reported(file string) {
	p.files = slices.DeleteFunc(p.files, func(s string) bool { return s == file })
}

// put puts in force what was read of a file, and remembers it where it could not
// be. What another file is waiting with goes on waiting. The caller holds mu.
func (f *files) put(file string, table *workload.Table, rules *policy.Set) error {
	p := &f.pending
	if file == "workloads" {
		p.table = nil
	} else {
		p.rules = nil
	}
	err := f.change(table, rules)
	if err == nil {
		p.reported(file)
		return nil
	}
	switch {
	case f.inForce(table, rules): // the maps are to settle
	case file == "workloads":
		p.table = table
	default:
		p.rules = rules
	}
	if !slices.Contains(p.files, file) {
		p.files = append(p.files, file)
	}
	p.at, p.wait = time.Now().Add(againAfter), 2*againAfter
	return err
}

// inForce reports whether the last change has put these in force. The caller
// holds mu.
func (f *files) inForce(table *workload.Table, rules *policy.Set) bool {
	return f.table == table && f.rules == rules
}

// retry tries again what is pending and due, and reports what another change has
// put in force.
func (f *files) retry(now time.Time, r *reports) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := &f.pending
	var err error
	switch {
	case p.none():
	case now.Before(p.at):
		return
	case p.table != nil || p.rules != nil:
		table, rules := p.table, p.rules
		if table == nil {
			table = f.table
		}
		if rules == nil {
			rules = f.rules
		}
		err = f.change(table, rules)
		if f.inForce(table, rules) {
			p.table, p.rules = nil, nil
		}
	default:
		f.modes.Lock()
		err = errors.Join(f.node.SetDestinations(f.destinations), f.modes.settle(f.rules))
		f.modes.Unlock()
	}
	if err != nil {
		r.log.Warn("what was read cannot be put in force yet", "files", p.files, "err", err, "again_in", p.wait)
		p.at, p.wait = now.Add(p.wait), min(2*p.wait, againAtMost)
		return
	}
	for _, name := range p.files {
		r.say(name, nil)
	}
	f.pending = pending{}
}
