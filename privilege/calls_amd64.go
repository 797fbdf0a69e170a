// SPDX-License-Identifier: Apache-2.0

package privilege

import "golang.org/x/sys/unix"

const (
	auditArch = unix.AUDIT_ARCH_X86_64
	x32       = 0x40000000 // __X32_SYSCALL_BIT
	fstatat   = unix.SYS_NEWFSTATAT
)

// ofArch are calls that other architectures have not.
func ofArch() []uint32 {
	return []uint32{
		unix.SYS_ARCH_PRCTL, // a new thread's storage, in builds without cgo
		unix.SYS_OPEN, unix.SYS_STAT, unix.SYS_LSTAT, unix.SYS_ACCESS, unix.SYS_READLINK,
		unix.SYS_POLL, unix.SYS_SELECT, unix.SYS_EPOLL_WAIT, unix.SYS_PIPE, unix.SYS_DUP2, unix.SYS_TIME,
	}
}
