// SPDX-License-Identifier: Apache-2.0

package privilege

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Mode says what becomes of a system call that the daemon has no need of.
type Mode string

// The modes.
const (
	Enforce  Mode = "enforce"  // it fails with EPERM, and the kernel logs it
	Log      Mode = "log"      // it goes on, and the kernel logs it
	Disabled Mode = "disabled" // nothing looks at it
)

// Confine refuses, in all threads of the process, what the list of this package
// does not have.
//
// A refused call fails with EPERM rather than to end the process, as under the
// filters of container runtimes and of most of systemd's units: one that we have
// forgotten, on a rare path, is then an error of one pod, while an end would reset
// what all pods of the node carry. The kernel logs each (audit, type 1326, also in
// dmesg). Calls of another architecture are nobody's mistake, and end the process.
// Those that are newer than this list fail with ENOSYS, as on the kernels of its
// time, so that a library falls back on an older one.
func Confine(mode Mode) error {
	if mode == Disabled {
		return nil
	}
	program, err := filter(mode)
	if err != nil {
		return fmt.Errorf("confine system calls: %w", err)
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("confine system calls: %w", err)
	}
	code := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	// Without SPEC_ALLOW, spec_store_bypass_disable=seccomp on the kernel's command
	// line slows the process down, by a defence against code of others in it.
	const flags = unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(code)
	switch {
	case errno == unix.EINVAL, errno == unix.ENOSYS:
		return fmt.Errorf("confine system calls: the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER): set seccomp to disabled: %w", errno)
	case errno != 0:
		return fmt.Errorf("confine system calls: %w", errno)
	case thread != 0: // seccomp(2): that of the thread that could not be synchronized
		return fmt.Errorf("confine system calls: thread %d has a filter of its own", thread)
	}
	return nil
}

// condition is about the low half of an argument. The kernel takes most arguments
// for 32 bits wide, and of the others it looks at bits of the low half.
type condition struct {
	argument    uint32
	mask, value uint32 // argument&mask == value
}

// rule allows a system call where all conditions of one of its lists hold.
type rule struct {
	call uint32
	any  [][]condition
}

// Where the fields of struct seccomp_data are (linux/seccomp.h).
const (
	offNumber    = 0
	offArch      = 4
	offArguments = 16 // 8 bytes each; the low half first, on little-endian machines
)

// filter is the program. The kernel runs it for calls with conditions and for those
// that are refused; what is always allowed it keeps in a bitmap (since 5.11,
// seccomp_cache_prepare in kernel/seccomp.c).
func filter(mode Mode) ([]bpf.Instruction, error) {
	if auditArch == 0 {
		return nil, fmt.Errorf("there is no list of system calls for %s: set seccomp to disabled", runtime.GOARCH)
	}
	load := func(off uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: off, Size: 4} }
	refuse := func(action uint32) bpf.Instruction {
		if mode == Log {
			action = unix.SECCOMP_RET_LOG
		}
		return bpf.RetConstant{Val: action}
	}
	allow := bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	foreign := refuse(unix.SECCOMP_RET_KILL_PROCESS)
	unknown := refuse(unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS))
	forbidden := refuse(unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM))

	out := []bpf.Instruction{
		load(offArch),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditArch, SkipTrue: 1},
		foreign,
		load(offNumber),
		// The second architecture that x86-64 has behind the same name (asm/unistd.h).
		bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: x32, SkipTrue: 1},
		foreign,
		bpf.JumpIf{Cond: bpf.JumpLessOrEqual, Val: newest, SkipTrue: 1},
		unknown,
		// Its flags are behind a pointer, where no filter can see them. The C library
		// takes clone instead.
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_CLONE3, SkipTrue: 1},
		unknown,
	}
	for _, r := range conditional() {
		var block []bpf.Instruction
		for _, all := range r.any {
			for i, c := range all {
				rest := 3*(len(all)-1-i) + 1 // instructions, with the one that allows
				block = append(block,
					load(offArguments+8*c.argument),
					bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: c.mask},
					bpf.JumpIf{Cond: bpf.JumpEqual, Val: c.value, SkipFalse: uint8(rest)})
			}
			block = append(block, allow)
		}
		block = append(block, forbidden)
		if len(block) > 255 {
			return nil, errors.New("a system call has more conditions than a jump is long")
		}
		out = append(out, bpf.JumpIf{Cond: bpf.JumpEqual, Val: r.call, SkipFalse: uint8(len(block))})
		out = append(out, block...)
	}
	for _, call := range unconditional() {
		out = append(out, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: call, SkipTrue: 1}, allow)
	}
	return append(out, forbidden), nil
}
