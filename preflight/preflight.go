// SPDX-License-Identifier: Apache-2.0

// Package preflight looks whether a machine has what the data plane needs, by
// trying it: a program is loaded, a namespace made, a rule added, and taken away
// again. It asks for no version. Each need is a Check, which says what the need is
// for, what it costs where it lacks, and the mend. docs/preflight.md is made of them.
//
// Run makes every check, for `ztunnel check`. Start makes those that take next to
// no time, before a daemon attaches anything. Neither changes the machine, and
// nothing needs closing.
package preflight

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/internal/input"
	"github.com/culvert-mesh/culvert/internal/netns"
)

// State says how a need was found.
type State string

// The states.
const (
	OK      State = "ok"
	Warn    State = "warn"    // it works, at a cost
	Fail    State = "fail"    // it lacks: ztunnel does not start, or not for a pod
	Skipped State = "skipped" // it cannot be told, since another need lacks
)

// Finding is what a check has found. A check has one at least.
type Finding struct {
	Check  string `json:"check"`
	State  State  `json:"state"`
	Detail string `json:"detail"`
	Mend   string `json:"mend,omitempty"` // what to do about it; none where it is ok
}

// Check is a need.
type Check struct {
	Name    string // unique
	Why     string // what it is for
	Without string // what it costs, where it lacks
	Mend    string
	AtStart bool // a daemon's start makes it too

	after []string // checks without which this one can tell nothing
	run   func(*look)
}

// Checks are all, in their order.
func Checks() []Check {
	return slices.Concat(processChecks(), kernelChecks(), mountChecks(), networkChecks(), podChecks(), []Check{trialCheck()})
}

// Machine is what is looked at.
type Machine struct {
	// Config is the daemon's; ConfigErr why there is none, Config is the default
	// one then.
	Config    *config.Config
	ConfigErr error

	facts *facts // nil: the machine's
}

// Run makes every check. It ends early when ctx does.
func Run(ctx context.Context, m Machine) []Finding { return m.run(ctx, false) }

// Start makes the checks of a daemon's start: it logs what comes at a cost, and its
// error names all that lacks, in the words of Run.
func Start(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	var lacking []string
	for _, f := range (Machine{Config: cfg}).run(ctx, true) {
		switch f.State {
		case Warn:
			log.Warn("this machine can run ztunnel at a cost", "check", f.Check, "found", f.Detail, "hint", f.Mend)
		case Fail:
			lacking = append(lacking, fmt.Sprintf("%s: %s: %s", f.Check, f.Detail, f.Mend))
		}
	}
	switch len(lacking) {
	case 0:
		return nil
	case 1:
		return errors.New(lacking[0])
	}
	return fmt.Errorf("this machine lacks what ztunnel needs:\n  %s", strings.Join(lacking, "\n  "))
}

func (m Machine) run(ctx context.Context, start bool) []Finding {
	l := &look{ctx: ctx, Machine: m, start: start, lacking: map[string]bool{}}
	if l.facts == nil {
		l.facts = realFacts()
	}
	defer l.close()
	for _, c := range Checks() {
		if start && !c.AtStart {
			continue
		}
		if ctx.Err() != nil {
			break
		}
		l.make(c)
	}
	return l.found
}

// look is one run of the checks.
type look struct {
	Machine
	ctx   context.Context
	start bool

	check   Check // the present one
	found   []Finding
	lacking map[string]bool // checks that failed, or could not be made

	scratch  *netns.NS              // the calling process's own at a start
	specs    []*ebpf.CollectionSpec // the daemon's programs, once they are read
	writable string                 // where the run folder is, or is to be
}

func (l *look) make(c Check) {
	l.check = c
	for _, need := range c.after {
		if l.lacking[need] {
			l.say(Skipped, "not looked at: it takes what %q lacks", need)
			return
		}
	}
	c.run(l)
}

func (l *look) say(s State, format string, args ...any) *Finding {
	f := Finding{Check: l.check.Name, State: s, Detail: oneLine(fmt.Sprintf(format, args...))}
	if s == Warn || s == Fail {
		f.Mend = l.check.Mend
	}
	if s == Fail || s == Skipped {
		l.lacking[l.check.Name] = true
	}
	l.found = append(l.found, f)
	return &l.found[len(l.found)-1]
}

func (l *look) ok(format string, args ...any)            { l.say(OK, format, args...) }
func (l *look) warn(format string, args ...any) *Finding { return l.say(Warn, format, args...) }
func (l *look) fail(format string, args ...any) *Finding { return l.say(Fail, format, args...) }

// mend replaces the check's own.
func (f *Finding) mend(format string, args ...any) { f.Mend = fmt.Sprintf(format, args...) }

// failed is a fail by an error; that of a file brings its own mend.
func (l *look) failed(err error) {
	var file *input.Error
	if errors.As(err, &file) {
		f := l.fail("%s: %s", file.Path, file.Problem)
		if file.Mend != "" {
			f.Mend = file.Mend
		}
		return
	}
	l.fail("%v", err)
}

// namespace is one to look at, which the look closes: a fresh one, or at a start
// the process's own.
func (l *look) namespace() (*netns.NS, error) {
	if l.scratch != nil {
		return l.scratch, nil
	}
	open := netns.New
	if l.start {
		open = netns.Current // a fresh one takes some milliseconds
	}
	var err error
	l.scratch, err = open()
	return l.scratch, err
}

func (l *look) close() {
	if l.scratch != nil {
		l.scratch.Close()
	}
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
