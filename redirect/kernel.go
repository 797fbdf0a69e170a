// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// explain adds the likely cause to the error of programs that do not load: of all
// that they use, bpf_set_retval came last (docs/ARCHITECTURE.md has the list).
func explain(err error) error {
	if lacks := features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval); errors.Is(lacks, ebpf.ErrNotSupported) {
		return fmt.Errorf("this kernel%s is too old: it lacks bpf_set_retval of Linux 5.18, run that or a newer one: %w", release(), err)
	}
	return err
}

// release is the running kernel's, as an insertion.
func release() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return ""
	}
	return " (" + unix.ByteSliceToString(name.Release[:]) + ")"
}
