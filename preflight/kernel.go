// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"unicode"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/bpf"
)

const (
	// tooOld is the mend of what a kernel lacks: of all that the programs use,
	// bpf_set_retval came last (docs/ARCHITECTURE.md has the list).
	tooOld    = "run Linux 5.18 or newer, with CONFIG_CGROUP_BPF"
	forbidden = "run it outside of a user namespace, with a seccomp profile that allows bpf(2), on a kernel that is not locked down (confidentiality)"
)

func kernelChecks() []Check {
	return []Check{
		{
			Name: "bpf", run: syscallAllowed, AtStart: true, after: []string{"capabilities"},
			Why:     "programs in the kernel steer the pods' connections",
			Without: "ztunnel does not start",
			Mend:    forbidden,
		},
		{
			Name: "bpf programs", run: programTypes, AtStart: true, after: []string{"bpf"},
			Why:     "the hooks of connect() and setsockopt(), and the lookup of listeners",
			Without: "ztunnel does not start",
			Mend:    tooOld,
		},
		{
			Name: "bpf helpers", run: helpers, AtStart: true, after: []string{"bpf programs"},
			Why:     "what the programs call: refusing with an errno, telling namespaces apart, storage at sockets",
			Without: "ztunnel does not start",
			Mend:    tooOld,
		},
		{
			// Not at a start: that makes them itself, and storage at sockets takes the
			// kernel tens of milliseconds.
			Name: "bpf maps", run: mapTypes, after: []string{"bpf"},
			Why:     "who is enrolled, what is carried, the listeners, the tunnel's own sockets, events",
			Without: "ztunnel does not start",
			Mend:    tooOld,
		},
	}
}

// syscallAllowed makes a map, which every kernel with bpf() has.
func syscallAllowed(l *look) {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	switch {
	case err == nil:
		m.Close()
		l.ok("allowed, on Linux %s", release())
	case errors.Is(err, unix.ENOSYS):
		l.fail("this kernel has no bpf()").mend("run one with CONFIG_BPF_SYSCALL")
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		l.fail("bpf() is forbidden, though the process has the capabilities: %v%s", errno(err), confinement())
	default:
		l.fail("bpf(): %v", err)
	}
}

// confinement says what may forbid bpf(), as an insertion.
func confinement() string {
	var why []string
	if ids, err := os.ReadFile("/proc/self/uid_map"); err == nil && oneLine(string(ids)) != "0 0 4294967295" {
		why = append(why, "it is in a user namespace")
	}
	if status, err := os.ReadFile("/proc/self/status"); err == nil && strings.Contains(string(status), "\nSeccomp:\t2\n") {
		why = append(why, "it has a seccomp filter")
	}
	if down, err := os.ReadFile("/sys/kernel/security/lockdown"); err == nil && strings.Contains(string(down), "[confidentiality]") {
		why = append(why, "the kernel is locked down")
	}
	if len(why) == 0 {
		return ""
	}
	return " (" + strings.Join(why, ", ") + ")"
}

// programs are those that the daemon loads.
func (l *look) programs() ([]*ebpf.CollectionSpec, error) {
	if l.specs != nil {
		return l.specs, nil
	}
	connect, err := bpf.LoadConnect()
	if err != nil {
		return nil, fmt.Errorf("read BPF programs: %w", err)
	}
	steer, err := bpf.LoadSteer()
	if err != nil {
		return nil, fmt.Errorf("read BPF programs: %w", err)
	}
	l.specs = []*ebpf.CollectionSpec{connect, steer}
	return l.specs, nil
}

// loadsProgram loads a program that does nothing.
func loadsProgram(t ebpf.ProgramType, attach ebpf.AttachType) error {
	p, err := ebpf.NewProgramWithOptions(&ebpf.ProgramSpec{
		Type: t, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	}, ebpf.ProgramOptions{LogDisabled: true})
	if err != nil {
		return err
	}
	return p.Close()
}

func programTypes(l *look) {
	l.eachOf(func(spec *ebpf.CollectionSpec, try func(name string, err error)) {
		for _, p := range spec.Programs {
			try(p.SectionName, l.facts.program(p.Type, p.AttachType))
		}
	})
}

func helpers(l *look) {
	l.eachOf(func(spec *ebpf.CollectionSpec, try func(name string, err error)) {
		for _, p := range spec.Programs {
			for _, ins := range p.Instructions {
				if ins.IsBuiltinCall() {
					fn := asm.BuiltinFunc(ins.Constant)
					try(helperName(fn), l.facts.helper(p.Type, fn))
				}
			}
		}
	})
}

func mapTypes(l *look) {
	l.eachOf(func(spec *ebpf.CollectionSpec, try func(name string, err error)) {
		for _, m := range spec.Maps {
			try(m.Type.String(), l.facts.mapType(m.Type))
		}
	})
}

// eachOf makes a finding of what each has tried of the daemon's programs.
func (l *look) eachOf(each func(spec *ebpf.CollectionSpec, try func(name string, err error))) {
	specs, err := l.programs()
	if err != nil {
		l.fail("%v", err)
		return
	}
	there, lacking := map[string]bool{}, map[string]bool{}
	var strange error
	for _, spec := range specs {
		each(spec, func(name string, err error) {
			switch {
			case err == nil:
				there[name] = true
			case errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL):
				lacking[name] = true
			default:
				strange = fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	switch {
	case len(lacking) > 0:
		l.fail("this kernel (%s) is too old: it lacks %s", release(), list(lacking))
	case strange != nil:
		l.fail("%v", strange).mend("%s", forbidden)
	default:
		l.ok("%s", list(there))
	}
}

func list(names map[string]bool) string {
	var out []string
	for n := range names {
		out = append(out, n)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// helperName is the kernel's: of FnSetRetval, bpf_set_retval.
func helperName(fn asm.BuiltinFunc) string {
	var b strings.Builder
	b.WriteString("bpf")
	for _, r := range strings.TrimPrefix(fn.String(), "Fn") {
		if unicode.IsUpper(r) {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

// release is the running kernel's.
func release() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return "of an unknown release"
	}
	return unix.ByteSliceToString(name.Release[:])
}

// errno is the system's word alone, where there is one.
func errno(err error) error {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}
