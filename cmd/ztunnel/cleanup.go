// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/redirect"
)

func cleanupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Release every pod and remove every trace from this node",
		Long: `Release every pod that ztunnel has enrolled on this node: remove its rules,
routes and programs, restore its settings, and say each thing that was removed.
From then on the pods connect as they would without Culvert: in plaintext.
Needs root; refuses while ztunnel runs. Harmless where there is nothing to do.`,
		Example: "  ztunnel cleanup\n  ztunnel cleanup --config /etc/culvert/config.yaml",
		Args:    cobra.NoArgs,
	}
	path := configFlag(cmd)
	runDir := cmd.Flags().String("run-dir", "", "the run `folder` of the daemon, in place of the configuration's")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := cleanupConfig(*path, *runDir, cmd.Flags().Changed("config"))
		if err != nil {
			return err
		}
		if uid := os.Geteuid(); uid != 0 {
			return fmt.Errorf("clean up: needs root, runs as user %d: use sudo", uid)
		}
		if redirect.PinsAreOutOfSight(c.RunDir) && (otherMounts() || namedNetns()) {
			return errors.New("clean up: there is no bpffs here, as `ip netns exec` or a container hides the node's, and what ztunnel has pinned there would stay: run it in the node's namespaces, such as by `nsenter --target 1 --mount --net`")
		}
		report, err := redirect.Cleanup(redirect.Config{
			RunDir: c.RunDir,
			Cgroup: c.Cgroup,
			Logger: newLogger(asJSON(c.Log.Format, cmd.ErrOrStderr()), c.Log.Level, cmd.ErrOrStderr()),
		})
		out := cmd.OutOrStdout()
		for _, line := range report {
			fmt.Fprintln(out, line)
		}
		if err != nil {
			return err
		}
		if len(report) == 0 {
			fmt.Fprintf(out, "nothing to clean up in %s\n", c.RunDir)
		}
		return nil
	}
	return cmd
}

// cleanupConfig finds the run folder. A configuration that is not there, or
// that a later version would refuse, is no reason to leave a node as it is.
func cleanupConfig(path, runDir string, asked bool) (*config.Config, error) {
	if runDir != "" {
		full, err := filepath.Abs(runDir)
		if err != nil {
			return nil, usageError{err}
		}
		c := config.Default("/")
		c.RunDir = full
		return c, nil
	}
	c, err := config.Load(path)
	if errors.Is(err, os.ErrNotExist) && !asked {
		return config.Default(filepath.Dir(path)), nil
	}
	if err != nil {
		return nil, usageError{fmt.Errorf("%w (or name the run folder with --run-dir)", err)}
	}
	return c, nil
}
