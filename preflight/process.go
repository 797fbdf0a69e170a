// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/identity/ca"
	"github.com/culvert-mesh/culvert/internal/input"
	"github.com/culvert-mesh/culvert/pod/static"
	"github.com/culvert-mesh/culvert/policy"
	"github.com/culvert-mesh/culvert/privilege"
	"github.com/culvert-mesh/culvert/workload"
)

const (
	// enoughDescriptors is some 30,000 connections between pods of one node.
	enoughDescriptors = 65536
	// made is before any certificate that this version can have made.
	made = 2026 // year
)

func processChecks() []Check {
	return []Check{
		{
			Name: "configuration", run: configuration,
			Why:     "it and the files that it names are read at the start",
			Without: "ztunnel does not start",
			Mend:    "correct the file; `ztunnel config --check` says what all of them hold",
		},
		{
			Name: "capabilities", run: capabilities, AtStart: true,
			Why:     "programs, rules, marks, and entering pods' namespaces",
			Without: "ztunnel does not start",
			Mend:    privilege.Mend,
		},
		{
			Name: "descriptors", run: descriptors, AtStart: true,
			Why:     "a connection takes one at each end, a session one, a pod eight",
			Without: "connections beyond the limit are reset",
			Mend:    "raise the hard limit: systemd: LimitNOFILE=524288; a shell: `ulimit -Hn 524288`",
		},
		{
			Name: "clock", run: clock, AtStart: true,
			Why:     "certificates are valid for a time",
			Without: "certificates are refused, as not yet valid or expired, by this node or by its peers",
			Mend:    "set the clock, and run an NTP client such as chrony or systemd-timesyncd",
		},
		{
			Name: "AES instructions", run: instructions, AtStart: true,
			Why:     "each byte is enciphered",
			Without: "the CPU does it in software: several times the work for each byte",
			Mend:    "give the virtual machine a CPU model that has them (QEMU: -cpu host)",
		},
	}
}

// File is a file that a configuration names, as it was read.
type File struct {
	Path  string   // "": it names none
	State string   // "good", and what it holds
	Notes []string // what follows from it
	Err   error
}

// Files reads the files that a configuration names, and starts and changes nothing.
func Files(c *config.Config) []File {
	var out []File
	read := func(path, what string, parse func(data []byte) (int, error)) *File {
		f := File{Path: path}
		if path != "" {
			data, err := input.Read(path, input.Max)
			n := 0
			if err == nil {
				n, err = parse(data)
			}
			if n == 1 {
				what = strings.TrimSuffix(what, "s")
			}
			f.Err, f.State = err, fmt.Sprintf("good, %d %s", n, what)
		}
		out = append(out, f)
		return &out[len(out)-1]
	}
	read(c.Workloads.File, "workloads", func(data []byte) (int, error) {
		list, err := workload.ParseFile(c.Workloads.File, data, c.TrustDomain)
		return len(list), err
	})
	read(c.Pods.File, "pods", func(data []byte) (int, error) {
		list, err := static.ParseFile(c.Pods.File, data, c.TrustDomain)
		return len(list), err
	})
	modes := []policy.ModeRule{policy.DefaultMode(policy.Mode(c.Mode))}
	rules := read(c.Policy.File, "rules", func(data []byte) (int, error) {
		f, err := policy.ParseFile(c.Policy.File, data)
		modes = append(modes, f.Modes...)
		return len(f.Rules), err
	})
	for _, m := range policy.NewSet(nil, modes...).Modes() {
		rules.Notes = append(rules.Notes, fmt.Sprintf("plaintext for %s", m))
	}
	read(c.Identity.TrustFile, "further trust domains", func(data []byte) (int, error) {
		t, err := config.ParseTrust(c.Identity.TrustFile, data)
		if err != nil {
			return 0, err
		}
		return len(t.Roots), nil
	})
	authority := File{Path: c.Identity.CA.Dir, State: "good"}
	there, err := ca.Check(ca.Config{Dir: c.Identity.CA.Dir, TrustDomain: c.TrustDomain})
	if authority.Err = err; !there {
		authority.State = "empty, the first start makes a certificate authority"
	}
	return append(out, authority)
}

func configuration(l *look) {
	if l.ConfigErr != nil {
		l.failed(l.ConfigErr)
		return
	}
	bad := false
	for _, f := range Files(l.Config) {
		if f.Err != nil {
			l.failed(f.Err)
			bad = true
		}
	}
	if !bad {
		l.ok("%s, and the files that it names", l.Config.Path)
	}
}

func capabilities(l *look) {
	missing, err := privilege.Missing()
	switch {
	case err != nil:
		l.fail("%v", err)
	case missing != "":
		l.fail("the process lacks %s", missing)
	default:
		var all []string
		for _, c := range privilege.Needed() {
			all = append(all, c.Name)
		}
		l.ok("%s", strings.Join(all, ", "))
	}
}

func descriptors(l *look) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		l.warn("ask for the limit of open files: %v", err)
		return
	}
	// Go raises the soft limit to the hard one when it starts.
	if limit.Max < enoughDescriptors {
		l.warn("at most %d open files, and as many connections", limit.Max)
		return
	}
	l.ok("%d open files", limit.Max)
}

func clock(l *look) {
	now := l.facts.now()
	if now.Year() < made {
		l.fail("the clock says %s", now.UTC().Format(time.RFC3339))
		return
	}
	// A virtual machine may be kept in time by its host, without the kernel knowing.
	if synced, err := l.facts.synced(); err == nil && !synced {
		l.warn("the clock says %s; nobody keeps it in time (adjtimex: unsynchronised)", now.UTC().Format(time.RFC3339))
		return
	}
	l.ok("%s", now.UTC().Format(time.RFC3339))
}

func instructions(l *look) {
	if !l.facts.aes() {
		l.warn("this CPU has none for AES-GCM (x86-64: AES-NI and PCLMULQDQ; arm64: AES and PMULL)")
		return
	}
	l.ok("this CPU has them")
}
