// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func commands() []*cobra.Command {
	return []*cobra.Command{
		runCommand(),
		checkCommand(),
		statusCommand(),
		podsCommand(),
		connectionsCommand(),
		workloadsCommand(),
		certsCommand(),
		metricsCommand(),
		logLevelCommand(),
		cleanupCommand(),
		configCommand(),
		caCommand(),
		bugreportCommand(),
		versionCommand(),
		completionCommand(),
	}
}

// group makes a command that only holds others: by itself it prints its help,
// and a name that it does not know is a mistake (cobra prints help for both).
func group(cmd *cobra.Command) *cobra.Command {
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	return cmd
}
