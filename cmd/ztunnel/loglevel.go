// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/admin"
	"github.com/culvert-mesh/culvert/daemon"
)

func logLevelCommand() *cobra.Command {
	levels := []string{"debug", "info", "warn", "error"}
	cmd := &cobra.Command{
		Use:   "log-level [" + strings.Join(levels, "|") + "]",
		Short: "Show or set how much the daemon logs",
		Long: `Show how much the daemon logs, or set it, until its next start: from then on it is
the configuration's log.level again. The access log is not of it. Needs root.`,
		Example:   "  ztunnel log-level\n  ztunnel log-level debug",
		ValidArgs: levels,
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), oneOf(levels)),
	}
	a := newAsker(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var level daemon.LogLevel
		if len(args) == 0 {
			if err := a.get(cmd.Context(), "/log-level", &level); err != nil {
				return err
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), level.Level)
			return err
		}
		if err := a.reach(func(socket string) error {
			return admin.Post(cmd.Context(), socket, "/log-level", daemon.LogLevel{Level: args[0]}, &level)
		}); err != nil {
			return err
		}
		_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s, until the next start\n", level.Level)
		return err
	}
	return cmd
}

// oneOf takes arguments of a list, and says which there are.
func oneOf(list []string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		for _, arg := range args {
			if !slices.Contains(list, arg) {
				return fmt.Errorf("%q is not one of %s", arg, strings.Join(list, ", "))
			}
		}
		return nil
	}
}
