// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/daemon"
	"github.com/culvert-mesh/culvert/internal/cli"
)

func workloadsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "workloads [ADDRESS|TEXT]",
		Short: "List the workloads that this node knows of",
		Long: `List the workloads that this node knows of: who lives at which address, and which
identity has to be proven there. With an address, the workload that has it; with
any other text, those whose name, node or identity it is part of. Needs root.`,
		Example: "  ztunnel workloads\n  ztunnel workloads 10.0.1.7\n  ztunnel workloads demo/ -o yaml",
		Args:    cobra.MaximumNArgs(1),
	}
	a := newAsker(cmd).listed()
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		of := whole[[]daemon.Workload]
		if len(args) > 0 {
			of = func(all []daemon.Workload) []daemon.Workload {
				return slices.DeleteFunc(all, func(w daemon.Workload) bool { return !isAbout(w, args[0]) })
			}
		}
		return show(a, "/workloads", of, workloadsText)
	}
	return cmd
}

// isAbout says whether a workload is one that was asked for.
func isAbout(w daemon.Workload, text string) bool {
	if addr, err := netip.ParseAddr(text); err == nil {
		return slices.Contains(w.Addresses, addr.Unmap())
	}
	return slices.ContainsFunc([]string{w.Namespace + "/" + w.Workload, w.Node, w.Identity}, func(s string) bool { return strings.Contains(s, text) })
}

// workloadsText is the list for a person.
func workloadsText(list []daemon.Workload, _ time.Time) string {
	if len(list) == 0 {
		return "No workloads.\n"
	}
	var b strings.Builder
	t := cli.NewTable("WORKLOAD", "PROTOCOL", "ADDRESSES", "NODE", "IDENTITY")
	for _, w := range list {
		t.Row(w.Namespace+"/"+w.Workload, w.Protocol, joined(w.Addresses), or(w.Node), w.Identity)
	}
	t.WriteTo(&b)
	return b.String()
}
