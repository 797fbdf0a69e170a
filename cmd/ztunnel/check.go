// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/internal/cli"
	"github.com/culvert-mesh/culvert/preflight"
)

func checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look whether this machine has what ztunnel needs",
		Long: `Look whether this machine, and the pods of the configuration, have what ztunnel
needs: by trying each thing, in a namespace and a cgroup of its own, and taking it
away again. It says what was found, what it costs where it lacks, and the mend.
Needs root, and may run beside a daemon. The exit code is 0 where nothing lacks,
also with warnings (!), and 1 where something does (✗).`,
		Example: "  ztunnel check\n  ztunnel check --config /etc/culvert/config.yaml -o json",
		Args:    cobra.NoArgs,
	}
	a := (&asker{cmd: cmd, config: configFlag(cmd)}).formed()
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := a.check(); err != nil {
			return err
		}
		// What was put up for a try is taken away again.
		ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		var m preflight.Machine
		m.Config, m.ConfigErr = config.Load(*a.config)
		if m.ConfigErr != nil {
			m.Config = config.Default(filepath.Dir(*a.config))
		}
		found := preflight.Run(ctx, m)
		if ctx.Err() != nil {
			return errors.New("told to end: not everything was looked at")
		}
		if err := printFindings(cmd.OutOrStdout(), *a.output, found); err != nil {
			return err
		}
		lacking := 0
		for _, f := range found {
			if f.State == preflight.Fail {
				lacking++
			}
		}
		switch lacking {
		case 0:
			return nil
		case 1:
			return errors.New("check: one thing lacks")
		}
		return fmt.Errorf("check: %d things lack", lacking)
	}
	return cmd
}

// printFindings prints a line for each finding, and below what is to be done; or
// all in another form.
func printFindings(out io.Writer, output string, found []preflight.Finding) error {
	if output != outputTable {
		text, err := form(output, found, nil)
		if err == nil {
			_, err = fmt.Fprint(out, text)
		}
		return err
	}
	width, without := 0, map[string]string{}
	for _, c := range preflight.Checks() {
		width, without[c.Name] = max(width, len(c.Name)), c.Without
	}
	r := cli.NewReport(out, width)
	for _, f := range found {
		switch f.State {
		case preflight.OK:
			r.Check(true, f.Check, "%s", f.Detail)
		case preflight.Warn:
			r.Warn(f.Check, "%s", f.Detail)
		case preflight.Fail:
			r.Check(false, f.Check, "%s", f.Detail)
		default:
			r.Info(f.Check, "%s", f.Detail)
		}
		if f.Mend != "" {
			r.More("cost: %s", without[f.Check])
			r.More("mend: %s", f.Mend)
		}
	}
	return nil
}
