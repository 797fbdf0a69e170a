// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// capabilities are what a Node cannot do without. CAP_SYS_ADMIN, which entering
// namespaces asks for, includes CAP_BPF.
var capabilities = []struct {
	name string
	bit  uint
	need string
}{
	{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN, "rules, routes, marks and hooks"},
	{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN, "entering pods' network namespaces, and BPF programs"},
}

// checkCapabilities names what the process lacks, before anything is attached: one
// that finds out later has pods that it cannot enrol, in plaintext.
func checkCapabilities() error {
	var have [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &have[0]); err != nil {
		return fmt.Errorf("ask for the process's capabilities: %w", err)
	}
	var lacking []string
	for _, c := range capabilities {
		if have[0].Effective&(1<<c.bit) == 0 {
			lacking = append(lacking, fmt.Sprintf("%s (for %s)", c.name, c.need))
		}
	}
	if len(lacking) > 0 {
		return fmt.Errorf("the process lacks %s: start it as root, with these capabilities in its bounding set, or as a privileged container", strings.Join(lacking, " and "))
	}
	return nil
}
