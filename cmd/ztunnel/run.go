// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/daemon"
	"github.com/culvert-mesh/culvert/privilege"
	"github.com/culvert-mesh/culvert/telemetry"
)

func runCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the data plane of this node",
		Long: `Run the data plane of this node until it is told to end (SIGINT, SIGTERM). Needs
root. The access log goes to standard output, everything else to standard error.

The workload, pod, policy and trust files are watched, and the authority's
folder: a change takes effect without a restart, and SIGHUP has them read at
once. One that is broken changes nothing; the log says what is wrong, and where.
What the configuration file itself says takes a restart.

When ztunnel ends, for whatever reason, enrolled pods stay enrolled, and their
connections to the mesh are refused rather than sent in plaintext. ztunnel
cleanup releases them.`,
		Example: "  ztunnel run --config /etc/culvert/config.yaml",
		Args:    cobra.NoArgs,
	}
	path := configFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := config.Load(*path)
		if err != nil {
			return err
		}
		if uid := os.Geteuid(); uid != 0 {
			return fmt.Errorf("run data plane: needs root, runs as user %d: start it with sudo, or as a privileged container", uid)
		}
		if err := privilege.Reduce(); err != nil {
			return fmt.Errorf("run data plane: %w", err)
		}
		// A crash ends by SIGABRT. Go's exit code for it is that of a wrong file,
		// after which no service manager should start it again. There is no core
		// file: its memory is not dumpable by now.
		debug.SetTraceback("crash")
		// A reader of the access log that goes away is an error of a write, and
		// not the end of everybody's connections.
		signal.Ignore(syscall.SIGPIPE)
		ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		hangup := make(chan os.Signal, 1)
		signal.Notify(hangup, syscall.SIGHUP)
		defer signal.Stop(hangup)
		context.AfterFunc(ctx, stop) // a second signal ends at once
		level, lines := &slog.LevelVar{}, &daemon.Lines{}
		level.Set(c.Log.Level)
		stderr := telemetry.NewSpool(cmd.ErrOrStderr())
		defer func() {
			if stderr.Close() != nil { // nobody reads what else there is to say
				cmd.Root().SetErr(io.Discard)
			}
		}()
		log := newLogger(asJSON(c.Log.Format, cmd.ErrOrStderr()), level, lines, stderr)
		return daemon.Run(ctx, c, daemon.Options{
			Logger:    log,
			Level:     level,
			Lines:     lines,
			Log:       stderr,
			Version:   buildVersion(),
			AccessLog: cmd.OutOrStdout(),
			Reload:    hangup,
			Ready: func() {
				if err := notifyReady(); err != nil {
					log.Error("started, and could not say so", "err", err)
				}
			},
		})
	}
	return cmd
}
