// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/daemon"
	"github.com/culvert-mesh/culvert/internal/cli"
	"github.com/culvert-mesh/culvert/preflight"
)

// configFlag adds --config to a command.
func configFlag(cmd *cobra.Command) *string {
	return cmd.Flags().StringP("config", "c", defaultConfig, "the configuration `file`")
}

func configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the configuration in effect, or check all files",
		Long: `Print the configuration with every default filled in, in the form of the file.
With --check, read the files that it names too, and say what they hold. The
folder of the certificate authority is among them, so that it needs root.
Nothing is started or changed.`,
		Example: "  ztunnel config --config /etc/culvert/config.yaml\n  ztunnel config --check",
		Args:    cobra.NoArgs,
	}
	path := configFlag(cmd)
	check := cmd.Flags().Bool("check", false, "read the workloads, pods, policy and trust files and the authority's folder too")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(*path)
		if err != nil {
			return err
		}
		if *check {
			return checkFiles(cmd.OutOrStdout(), c)
		}
		b, err := c.YAML()
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(b)
		return err
	}
	return cmd
}

// checkFiles reads every file that the configuration names, and goes on past
// those that are wrong.
func checkFiles(out io.Writer, c *config.Config) error {
	errs := []error{daemon.Check(c)}
	fmt.Fprintf(out, "%s: good\n", c.Path)
	for _, f := range preflight.Files(c) {
		if f.Err != nil {
			errs = append(errs, f.Err)
		} else if f.Path != "" {
			fmt.Fprintf(out, "%s: %s\n", f.Path, f.State)
		}
		for _, note := range f.Notes {
			fmt.Fprintln(out, note)
		}
	}
	return errors.Join(errs...)
}

// asJSON says whether lines that end up at w are to be JSON.
func asJSON(form config.Format, w io.Writer) bool {
	return form == config.FormatJSON || form == config.FormatAuto && !cli.IsTerminal(w)
}

// newLogger makes the daemon's own log. Level is that of the lines, and may change;
// each of to gets them all.
func newLogger(asJSON bool, level slog.Leveler, to ...io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level, ReplaceAttr: withUnit}
	w := io.MultiWriter(to...)
	if asJSON {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// withUnit writes a duration as text: JSON has a bare number of nanoseconds for it.
func withUnit(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}
