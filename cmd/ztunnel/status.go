// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/daemon"
	tables "github.com/culvert-mesh/culvert/internal/cli"
)

func statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say how the ztunnel of this node is, and each of its pods",
		Long: `Say how the ztunnel that runs on this node is: its process, version and folders,
how the files that it watches were taken, and each pod: where it is in its life,
why it is not further, and when its certificate ends. Needs root.`,
		Example: "  ztunnel status\n  ztunnel status --run-dir /run/culvert -o json",
		Args:    cobra.NoArgs,
	}
	a := newAsker(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var s daemon.Status
		return a.ask("/status", &s, func() error {
			_, err := fmt.Fprint(cmd.OutOrStdout(), statusText(s, time.Now()))
			return err
		})
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
	head := tables.NewTable()
	head.Row("ztunnel", fmt.Sprintf("%s, process %d, up %s", s.Version, s.PID, age(now.Sub(s.Started))))
	head.Row("state", state)
	head.Row("node", s.Node)
	head.Row("run folder", s.RunDir)
	head.Row("configuration", s.Config)
	head.Row("cgroup", s.Cgroup)
	if s.MemoryLimit > 0 {
		head.Row("memory limit", tables.Bytes(s.MemoryLimit))
	}
	head.Row("snapshot", s.Snapshot)
	for _, m := range s.Modes {
		head.Row("plaintext for", m)
	}
	head.WriteTo(&b)

	b.WriteString("\n")
	if len(s.Files) == 0 {
		b.WriteString("Files are as they were read at the start.\n")
	} else {
		files := tables.NewTable("FILE", "READ AGAIN", "STATE")
		for _, f := range s.Files {
			state := "taken"
			if f.Error != "" {
				state = "not taken, the last good state stays in force: " + oneLine(f.Error)
			}
			files.Row(f.File, age(now.Sub(f.Time))+" ago", state)
		}
		files.WriteTo(&b)
	}

	b.WriteString("\n")
	if len(s.Pods) == 0 {
		b.WriteString("No pods: nothing is carried.\n")
		return b.String()
	}
	pods := tables.NewTable("POD", "STATE", "FOR", "ADDRESSES", "CERTIFICATE", "IDENTITY", "WHY")
	for _, p := range s.Pods {
		addrs := make([]string, len(p.Addresses))
		for i, a := range p.Addresses {
			addrs[i] = a.String()
		}
		pods.Row(p.Pod, p.State, age(now.Sub(p.Since)), or(strings.Join(addrs, ",")), certificate(p.Expires, now), p.Identity, or(oneLine(p.Reason)))
	}
	pods.WriteTo(&b)
	return b.String()
}

func certificate(end *time.Time, now time.Time) string {
	switch {
	case end == nil:
		return "-"
	case !end.After(now):
		return "expired " + age(now.Sub(*end)) + " ago"
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
