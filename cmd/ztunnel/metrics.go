// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func metricsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "metrics [TEXT]",
		Short: "Print the metrics",
		Long: `Print the daemon's metrics, as Prometheus reads them. With a text, only those
series in which it is found, by name or by label. Needs root.`,
		Example: "  ztunnel metrics\n  ztunnel metrics culvert_connections_closed_total\n  ztunnel metrics 'reason=\"denied\"' --watch",
		Args:    cobra.MaximumNArgs(1),
	}
	a := newAsker(cmd).watched()
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		return a.repeat(func(ctx context.Context) (string, error) {
			var text []byte
			if err := a.get(ctx, "/metrics", &text); err != nil {
				return "", err
			}
			if len(args) == 0 {
				return string(text), nil
			}
			found := series(string(text), args[0])
			if found == "" {
				return fmt.Sprintf("No series has %q.\n", args[0]), nil
			}
			return found, nil
		})
	}
	return cmd
}

// series are the lines of metrics in which a text is found, with what is said of
// their names.
func series(metrics, text string) string {
	var b, about strings.Builder
	for line := range strings.Lines(metrics) {
		switch {
		case strings.HasPrefix(line, "# HELP "):
			about.Reset()
			about.WriteString(line)
		case strings.HasPrefix(line, "#"):
			about.WriteString(line)
		case strings.Contains(line, text):
			b.WriteString(about.String())
			b.WriteString(line)
			about.Reset()
		}
	}
	return b.String()
}
