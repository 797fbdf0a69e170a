// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/daemon"
	"github.com/culvert-mesh/culvert/internal/cli"
)

func statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say how the ztunnel of this node is",
		Long: `Say how the ztunnel that runs on this node is: its process, version and folders,
how the files that it watches were taken, how many of its pods are where in their
lives, and which of them are not ready, and why. Needs root.`,
		Example: "  ztunnel status\n  ztunnel status --run-dir /run/culvert -o json\n  ztunnel status --watch=5s",
		Args:    cobra.NoArgs,
	}
	a := newAsker(cmd).listed()
	cmd.RunE = func(*cobra.Command, []string) error {
		return show(a, "/status", whole[daemon.Status], statusText)
	}
	return cmd
}

func podsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "pods",
		Short: "List the pods of this node",
		Long: `List the pods of this node: where each is in its life (enrolling, ready, draining),
for how long, why it is not further, and when its certificate ends. A pod that is
not ready is refused what it opens to the mesh. Needs root.`,
		Example: "  ztunnel pods\n  ztunnel pods --watch\n  ztunnel pods -o json | jq '.[] | select(.state != \"ready\")'",
		Args:    cobra.NoArgs,
	}
	a := newAsker(cmd).listed()
	cmd.RunE = func(*cobra.Command, []string) error {
		return show(a, "/status", func(s daemon.Status) []daemon.PodStatus { return s.Pods }, podsText)
	}
	return cmd
}

// statusText is the status for a person.
func statusText(s daemon.Status, now time.Time) string {
	var b strings.Builder
	state := "ready"
	if !s.Ready {
		state = "starting: pods are being enrolled"
	}
	head := cli.NewTable()
	head.Row("ztunnel", fmt.Sprintf("%s, process %d, up %s", s.Version, s.PID, age(now.Sub(s.Started))))
	head.Row("state", state)
	head.Row("pods", podCounts(s.Pods))
	head.Row("node", s.Node)
	head.Row("run folder", s.RunDir)
	head.Row("configuration", s.Config)
	head.Row("cgroup", s.Cgroup)
	if s.MemoryLimit > 0 {
		head.Row("memory limit", cli.Bytes(s.MemoryLimit))
	}
	head.Row("capabilities", or(s.Capabilities))
	head.Row("seccomp", or(s.Seccomp))
	head.Row("log level", or(s.LogLevel))
	head.Row("snapshot", s.Snapshot)
	for _, m := range s.Modes {
		head.Row("plaintext for", m)
	}
	head.WriteTo(&b)

	b.WriteString("\n")
	if len(s.Files) == 0 {
		b.WriteString("Files are as they were read at the start.\n")
	} else {
		files := cli.NewTable("FILE", "READ AGAIN", "STATE")
		for _, f := range s.Files {
			state := "taken"
			if f.Error != "" {
				state = "not taken, the last good state stays in force: " + oneLine(f.Error)
			}
			files.Row(f.File, age(now.Sub(f.Time))+" ago", state)
		}
		files.WriteTo(&b)
	}

	unready := slices.DeleteFunc(slices.Clone(s.Pods), func(p daemon.PodStatus) bool { return p.State == readyState && p.Reason == "" })
	if len(unready) > 0 {
		b.WriteString("\n" + podsText(unready, now))
	}
	return b.String()
}

// readyState is the state of a pod that is carried.
const readyState = "ready"

// podCounts is how many pods there are, by state.
func podCounts(pods []daemon.PodStatus) string {
	if len(pods) == 0 {
		return "none: nothing is carried"
	}
	count := map[string]int{}
	for _, p := range pods {
		count[p.State]++
	}
	var parts []string
	for _, state := range slices.Sorted(maps.Keys(count)) {
		parts = append(parts, fmt.Sprintf("%d %s", count[state], state))
	}
	return strings.Join(parts, ", ")
}

// podsText is the list for a person.
func podsText(list []daemon.PodStatus, now time.Time) string {
	if len(list) == 0 {
		return "No pods: nothing is carried.\n"
	}
	var b strings.Builder
	pods := cli.NewTable("POD", "STATE", "FOR", "ADDRESSES", "CERTIFICATE", "IDENTITY", "WHY")
	for _, p := range list {
		pods.Row(p.Pod, p.State, age(now.Sub(p.Since)), or(joined(p.Addresses)), certificate(p.Expires, now), p.Identity, or(oneLine(p.Reason)))
	}
	pods.WriteTo(&b)
	return b.String()
}

// joined are addresses in a cell.
func joined(addrs []netip.Addr) string {
	texts := make([]string, len(addrs))
	for i, a := range addrs {
		texts[i] = a.String()
	}
	return strings.Join(texts, ",")
}

func certificate(end *time.Time, now time.Time) string {
	if end == nil {
		return "-"
	}
	return ends(*end, now)
}

// ends is when something ends, or has ended.
func ends(end, now time.Time) string {
	if !end.After(now) {
		return "expired " + age(now.Sub(end)) + " ago"
	}
	return "ends in " + age(end.Sub(now))
}

// age is a time for a table: two units at most.
func age(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
}
