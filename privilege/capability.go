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

// capabilities is a set of them, by number.
type capabilities uint64

func needed() (set capabilities) {
	for _, c := range Needed() {
		set |= 1 << c.Number
	}
	return set
}

func (s capabilities) has(number uint) bool { return s&(1<<number) != 0 }

// String names those that are needed, and gives the others as a mask.
func (s capabilities) String() string {
	var names []string
	for _, c := range Needed() {
		if s.has(c.Number) {
			names = append(names, c.Name)
			s &^= 1 << c.Number
		}
	}
	if s != 0 {
		names = append(names, fmt.Sprintf("others (%#x)", uint64(s)))
	}
	return strings.Join(names, ", ")
}

// Mend is what helps where needed capabilities are missing.
const Mend = "start it as root, with these capabilities in its bounding set, or as a privileged container"

// Missing names those of the needed capabilities that the calling thread has not,
// each with what it is for; "" for none.
func Missing() (string, error) {
	own, err := status("/proc/thread-self/status")
	if err != nil {
		return "", err
	}
	var lacking []string
	for _, c := range Needed() {
		if !own.effective.has(c.Number) {
			lacking = append(lacking, fmt.Sprintf("%s (for %s)", c.Name, c.Reason))
		}
	}
	return strings.Join(lacking, " and "), nil
}
