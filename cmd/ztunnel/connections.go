// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/daemon"
	"github.com/culvert-mesh/culvert/internal/cli"
)

func connectionsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "connections",
		Short: "List the connections that are carried, were refused, or are in plaintext",
		Long: `List the connections of this node's pods that the tunnel has at this moment: from
where to where, whose identity each end has proven, for how long, and how many
bytes. One between two pods of this node is there twice, once at each end.

With --refused, list those that were refused last, or ended by the tunnel: when, how
often one like it was, by which rule, and why. 256 are kept; the access log has all.

With --plaintext, list those in plaintext instead: from before a pod's enrolment
(existing), and let in by the mode (permissive). What is plaintext by configuration
passes by ztunnel, and is not listed: to workloads that say tcp, to bypass.cidrs,
and to addresses that are not of the mesh. Needs root.`,
		Example: "  ztunnel connections\n  ztunnel connections --refused\n  ztunnel connections --refused --watch\n  ztunnel connections --plaintext\n  ztunnel connections -o json | jq .total",
		Args:    cobra.NoArgs,
	}
	a := newAsker(cmd).listed()
	plaintext := cmd.Flags().Bool("plaintext", false, "those in plaintext instead")
	refused := cmd.Flags().Bool("refused", false, "those that were refused last instead, and why")
	cmd.RunE = func(*cobra.Command, []string) error {
		switch {
		case *plaintext && *refused:
			return usageError{errors.New("--plaintext and --refused are two lists: ask for one")}
		case *plaintext:
			return show(a, "/connections/plaintext", whole[daemon.Plaintext], plaintextText)
		case *refused:
			return show(a, "/connections/refused", whole[daemon.Refused], refusedText)
		}
		return show(a, "/connections", whole[daemon.Connections], connectionsText)
	}
	return cmd
}

// connectionsText is the list for a person.
func connectionsText(c daemon.Connections, _ time.Time) string {
	if len(c.Connections) == 0 {
		return "No connections.\n"
	}
	var b strings.Builder
	t := cli.NewTable("DIRECTION", "SOURCE", "DESTINATION", "AGE", "RECEIVED", "SENT", "SECURITY", "SOURCE IDENTITY", "DESTINATION IDENTITY").AlignRight(3, 4, 5)
	for _, l := range c.Connections {
		t.Row(l.Direction, end(l.Source), end(l.Destination), age(time.Duration(float64(l.Age)*float64(time.Second))),
			cli.Bytes(int64(l.Received)), cli.Bytes(int64(l.Sent)), l.Security, or(l.Source.Identity), or(l.Destination.Identity))
	}
	t.WriteTo(&b)
	if more := c.Total - len(c.Connections); more > 0 {
		fmt.Fprintf(&b, "and %d more\n", more)
	}
	return b.String()
}

// refusedText is the list for a person, the latest last, where a terminal stands.
func refusedText(r daemon.Refused, now time.Time) string {
	if r.Total == 0 {
		return "No connection was refused since the start.\n"
	}
	var b strings.Builder
	t := cli.NewTable("LAST", "TIMES", "DIRECTION", "SOURCE", "DESTINATION", "REASON", "RULE", "SOURCE IDENTITY", "WHY").AlignRight(1)
	shown := uint64(0)
	for _, l := range slices.Backward(r.Connections) {
		why := oneLine(l.Detail)
		if why == l.Rule && why != "" {
			why = "the policy's entry of this name denies it"
		}
		t.Row(age(now.Sub(l.Last))+" ago", l.Times, l.Direction, end(l.Source), end(l.Destination), l.Reason, or(l.Rule), or(l.Source.Identity), or(why))
		shown += l.Times
	}
	t.WriteTo(&b)
	if more := r.Total - shown; more > 0 {
		fmt.Fprintf(&b, "and %d more, which are in the access log: %d since the start\n", more, r.Total)
	}
	return b.String()
}

// plaintextText is the list for a person.
func plaintextText(p daemon.Plaintext, now time.Time) string {
	var b strings.Builder
	if len(p.Connections) == 0 {
		b.WriteString("No plaintext connections with the mesh. What is plaintext by configuration passes by ztunnel, and is not listed.\n")
	} else {
		t := cli.NewTable("KIND", "POD", "DIRECTION", "SOURCE", "DESTINATION", "AGE", "USER")
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
