// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

// facts are what a test cannot take away from a machine: they are the kernel's
// configuration, the CPU's, and the time.
type facts struct {
	now     func() time.Time
	synced  func() (bool, error)
	aes     func() bool
	program func(ebpf.ProgramType, ebpf.AttachType) error
	helper  func(ebpf.ProgramType, asm.BuiltinFunc) error
	mapType func(ebpf.MapType) error
	rules   func(family int) ([]netlink.Rule, error)
	destroy func(*netns.NS, sockdiag.Socket) error
}

func realFacts() *facts {
	return &facts{
		now: time.Now,
		synced: func() (bool, error) {
			var t unix.Timex
			_, err := unix.Adjtimex(&t) // no mode is set: it is read
			return t.Status&unix.STA_UNSYNC == 0, err
		},
		aes: func() bool {
			return cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ || cpu.ARM64.HasAES && cpu.ARM64.HasPMULL
		},
		program: loadsProgram,
		helper:  features.HaveProgramHelper,
		mapType: features.HaveMapType,
		rules:   netlink.RuleList,
		destroy: sockdiag.Destroy,
	}
}
