// SPDX-License-Identifier: Apache-2.0

package privilege

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Capability is one that the daemon keeps.
type Capability struct {
	Name   string
	Number uint   // capabilities(7)
	Reason string // what it is for, to be read after "for"
}

// Needed are the capabilities that the daemon cannot do without. It keeps these and
// no others. CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON, so they are not asked
// for: the kernel lets nobody without it into a network namespace.
func Needed() []Capability {
	return []Capability{
		{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN, "rules, routes, marks and hooks"},
		{"CAP_NET_RAW", unix.CAP_NET_RAW, "probing pods with a socket that is bound to a device"},
		{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN, "entering pods' network namespaces, and BPF programs"},
		{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE, "looking up the network namespaces of other users' processes"},
	}
}

// Missing are those of the needed capabilities that the calling thread has not.
func Missing() ([]Capability, error) {
	var have [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &have[0]); err != nil {
		return nil, fmt.Errorf("ask for the process's capabilities: %w", err)
	}
	var lacking []Capability
	for _, c := range Needed() {
		if have[c.Number/32].Effective&(1<<(c.Number%32)) == 0 {
			lacking = append(lacking, c)
		}
	}
	return lacking, nil
}

// Check names what the process lacks, with the mend. It is for the start: a daemon
// that finds out later has pods that it cannot enrol.
func Check() error {
	lacking, err := Missing()
	if err != nil || len(lacking) == 0 {
		return err
	}
	var names []string
	for _, c := range lacking {
		names = append(names, fmt.Sprintf("%s (for %s)", c.Name, c.Reason))
	}
	return fmt.Errorf("the process lacks %s: start it as root, with these capabilities in its bounding set, or as a privileged container", strings.Join(names, " and "))
}
