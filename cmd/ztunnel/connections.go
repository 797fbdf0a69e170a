// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/daemon"
	tables "github.com/culvert-mesh/culvert/internal/cli"
)

func connectionsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "connections",
		Short: "List the connections that are carried, or those in plaintext",
		Long: `List the connections of this node's pods that the tunnel has at this moment: from
where to where, whose identity each end has proven, for how long, and how many
bytes. One between two pods of this node is there twice, once at each end.

With --plaintext, list those in plaintext instead: from before a pod's enrolment
(existing), and let in by the mode (permissive). What is plaintext by configuration
passes by ztunnel, and is not listed: to workloads that say tcp, to bypass.cidrs,
and to addresses that are not of the mesh. Needs root.`,
		Example: "  ztunnel connections\n  ztunnel connections --plaintext\n  ztunnel connections -o json | jq .total",
		Args:    cobra.NoArgs,
	}
	a := newAsker(cmd)
	plaintext := cmd.Flags().Bool("plaintext", false, "those in plaintext instead")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *plaintext {
			var p daemon.Plaintext
			return a.ask("/connections/plaintext", &p, func() error {
				_, err := fmt.Fprint(cmd.OutOrStdout(), plaintextText(p, time.Now()))
				return err
			})
		}
		var c daemon.Connections
		return a.ask("/connections", &c, func() error {
			_, err := fmt.Fprint(cmd.OutOrStdout(), connectionsText(c))
			return err
		})
	}
	return cmd
}

// connectionsText is the list for a person.
func connectionsText(c daemon.Connections) string {
	if len(c.Connections) == 0 {
		return "No connections.\n"
	}
	var b strings.Builder
	t := tables.NewTable("DIRECTION", "SOURCE", "DESTINATION", "AGE", "RECEIVED", "SENT", "SECURITY", "SOURCE IDENTITY", "DESTINATION IDENTITY").AlignRight(3, 4, 5)
	for _, l := range c.Connections {
		t.Row(l.Direction, end(l.Source), end(l.Destination), age(time.Duration(float64(l.Age)*float64(time.Second))),
			tables.Bytes(int64(l.Received)), tables.Bytes(int64(l.Sent)), l.Security, or(l.Source.Identity), or(l.Destination.Identity))
	}
	t.WriteTo(&b)
	if more := c.Total - len(c.Connections); more > 0 {
		fmt.Fprintf(&b, "and %d more\n", more)
	}
	return b.String()
}

// plaintextText is the list for a person.
func plaintextText(p daemon.Plaintext, now time.Time) string {
	var b strings.Builder
	if len(p.Connections) == 0 {
		b.WriteString("No plaintext connections with the mesh. What is plaintext by configuration passes by ztunnel, and is not listed.\n")
	} else {
		t := tables.NewTable("KIND", "POD", "DIRECTION", "SOURCE", "DESTINATION", "AGE", "USER")
		for _, l := range p.Connections {
			since, uid := "-", "-"
			if l.Start != nil {
				since = age(now.Sub(*l.Start))
			}
			if l.UID != nil {
				uid = fmt.Sprint(*l.UID)
			}
			t.Row(l.Kind, l.Pod, l.Direction, end(l.Source), end(l.Destination), since, uid)
		}
		t.WriteTo(&b)
		if slices.ContainsFunc(p.Connections, func(l daemon.PlaintextConnection) bool { return l.Kind == daemon.KindExisting }) {
			b.WriteString("\nThose that are existing are older than their pod's enrolment. They end with the process that has them: restart it, or set existing: reset.\n")
		}
	}
	for _, pod := range slices.Sorted(maps.Keys(p.Failed)) {
		fmt.Fprintf(&b, "pod %s could not be looked at: %s\n", pod, oneLine(p.Failed[pod]))
	}
	return b.String()
}

// end is one end of a connection: its workload, where it is known, and address.
func end(p daemon.Party) string {
	if p.Workload == "" {
		return p.Address.String()
	}
	return p.Namespace + "/" + p.Workload + " " + p.Address.String()
}
