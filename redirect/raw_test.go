// SPDX-License-Identifier: Apache-2.0

package redirect_test

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// disconnect is connect(2) with an address that package unix cannot say.
func disconnect(fd int, sa *unix.RawSockaddrInet4) error {
	if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(sa)), unix.SizeofSockaddrInet4); errno != 0 {
		return errno
	}
	return nil
}
