// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/identity/ca"
	"github.com/culvert-mesh/culvert/internal/cli"
)

func caCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "ca",
		Short: "Make the authorities of a mesh, and look at them",
		Long: `Make the authorities of a mesh, and look at them. A single node needs none of this: ztunnel run
makes its own on first start. Several nodes share a root: make it once, and an
intermediate for each node, and bring each node its folder.`,
	})
	cmd.AddCommand(caInitCommand(), caIntermediateCommand(), caInspectCommand())
	return cmd
}

func caInitCommand() *cobra.Command {
	defaults := config.Default("/")
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a root and a first intermediate",
		Long: `Make a root and a first intermediate in a folder, which must not have a root.
The root's key is needed for further intermediates only: take it off line after.`,
		Example: "  ztunnel ca init --dir /var/lib/culvert/ca --trust-domain cluster.local",
		Args:    cobra.NoArgs,
	}
	dir := cmd.Flags().String("dir", defaults.Identity.CA.Dir, "the `folder` to make them in")
	domain := cmd.Flags().String("trust-domain", defaults.TrustDomain.Name(), "the mesh's trust `domain`")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		td, err := parseDomain(*domain)
		if err != nil {
			return err
		}
		if err := ca.Init(*dir, td, time.Now()); err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), `made the root and an intermediate of trust domain %s in %s
for another node:  ztunnel ca intermediate --root %s --out FOLDER --trust-domain %s
then take %s/root.key off line
`, td.Name(), *dir, *dir, td.Name(), *dir)
		return err
	}
	return cmd
}

func caIntermediateCommand() *cobra.Command {
	defaults := config.Default("/")
	cmd := &cobra.Command{
		Use:   "intermediate",
		Short: "Make an intermediate for another node",
		Long: `Make an intermediate for another node: a folder with the root's certificate, the
intermediate and its key, to be brought to that node as its identity.ca.dir.
The root's key does not go with it.`,
		Example: "  ztunnel ca intermediate --root /var/lib/culvert/ca --out ./node-2",
		Args:    cobra.NoArgs,
	}
	root := cmd.Flags().String("root", defaults.Identity.CA.Dir, "the `folder` with root.pem and root.key")
	out := cmd.Flags().String("out", "", "the `folder` to make")
	domain := cmd.Flags().String("trust-domain", defaults.TrustDomain.Name(), "the mesh's trust `domain`")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *out == "" {
			return usageError{fmt.Errorf("--out is needed: the folder to make")}
		}
		td, err := parseDomain(*domain)
		if err != nil {
			return err
		}
		if err := ca.NewIntermediate(*root, *out, td, time.Now()); err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "made an intermediate of trust domain %s in %s; bring that folder to its node as identity.ca.dir\n", td.Name(), *out)
		return err
	}
	return cmd
}

func caInspectCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inspect",
		Short: "Say what an authority's folder holds, and what is wrong with it",
		Long: `Say what an authority's folder holds: its certificates, when they end, which keys
are there, and what would keep ztunnel from using it. Keys are not shown.
ztunnel certs has what a running one uses, its leaves too.`,
		Example: "  ztunnel ca inspect\n  ztunnel ca inspect --dir ./node-2",
		Args:    cobra.NoArgs,
	}
	dir := cmd.Flags().String("dir", config.Default("/").Identity.CA.Dir, "the `folder` to look at")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		f, err := ca.Inspect(*dir)
		if err != nil {
			return err
		}
		now := time.Now()
		out := cmd.OutOrStdout()
		fmt.Fprint(out, certsText(identity.Trees(f.Certificates, now, nil), now), "\n")
		keys := cli.NewTable()
		keys.Row("root.key", keyText(f.RootKey, "renews the intermediate here; of several nodes, take it off line", "off line: somebody has to bring a new intermediate before this one ends"))
		keys.Row("intermediate.key", keyText(f.IntermediateKey, "signs leaves", "this folder can sign no leaf"))
		if _, err := keys.WriteTo(out); err != nil {
			return err
		}
		_, err = ca.Check(ca.Config{Dir: *dir, TrustDomain: f.Domain})
		return err
	}
	return cmd
}

func keyText(there bool, yes, no string) string {
	if there {
		return "there: " + yes
	}
	return "not there: " + no
}

func parseDomain(text string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(text)
	if err != nil || td.Name() != text {
		return td, usageError{fmt.Errorf("--trust-domain %q is not a SPIFFE trust domain in lower case, such as cluster.local", text)}
	}
	return td, nil
}
