// SPDX-License-Identifier: Apache-2.0

package privilege

import "golang.org/x/sys/unix"

const (
	auditArch = unix.AUDIT_ARCH_AARCH64
	x32       = 0x40000000 // no call has this bit
	fstatat   = unix.SYS_FSTATAT
)

// ofArch are calls that other architectures have not.
func ofArch() []uint32 { return nil }
