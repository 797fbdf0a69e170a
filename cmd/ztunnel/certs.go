// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/cli"
)

func certsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "certs",
		Short: "Show the certificates in use, and what is wrong with them",
		Long: `Show the certificates that this node's ztunnel uses, each below the one that has
signed it: the roots that it trusts, its intermediate, and the leaves of its pods;
when each ends, and what is wrong with it: expired, ending soon without having been
renewed, not yet valid, of an issuer that is not known, or denied by the trust file.
There are no keys in it. Needs root.`,
		Example: "  ztunnel certs\n  ztunnel certs -o json",
		Args:    cobra.NoArgs,
	}
	a := newAsker(cmd).listed()
	cmd.RunE = func(*cobra.Command, []string) error {
		return show(a, "/certs", whole[[]*identity.Tree], certsText)
	}
	return cmd
}

// certsText is the tree for a person.
func certsText(trees []*identity.Tree, now time.Time) string {
	var b strings.Builder
	t := cli.NewTable("CERTIFICATE", "KIND", "SERIAL", "VALIDITY", "STATE")
	certRows(t, trees, "", "", now)
	t.WriteTo(&b)
	return b.String()
}

// certRows adds trees to a table. The last of several has another branch.
func certRows(t *cli.Table, trees []*identity.Tree, branch, last string, now time.Time) {
	for i, c := range trees {
		lead, below := branch, strings.Replace(branch, "├ ", "│ ", 1)
		if i == len(trees)-1 {
			lead, below = last, strings.Replace(last, "└ ", "  ", 1)
		}
		name, validity, state := c.Name, ends(c.NotAfter, now), "good"
		if c.Kind != "leaf" && c.Domain != "" {
			name += ", " + c.Domain
		}
		if now.Before(c.NotBefore) {
			validity = "begins in " + age(c.NotBefore.Sub(now))
		}
		if len(c.Problems) > 0 {
			state = oneLine(strings.Join(c.Problems, "; "))
		}
		t.Row(lead+name, c.Kind, c.Serial, validity, state)
		certRows(t, c.Signed, below+"├ ", below+"└ ", now)
	}
}
