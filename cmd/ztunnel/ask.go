// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/admin"
	"github.com/culvert-mesh/culvert/redirect"
)

// asker is the flags of a command that asks the daemon, and how it asks.
type asker struct {
	cmd            *cobra.Command
	config, runDir *string
	output         *string
}

// Forms of the answer.
const (
	outputTable = "table"
	outputJSON  = "json"
)

func newAsker(cmd *cobra.Command) *asker {
	return &asker{
		cmd:    cmd,
		config: configFlag(cmd),
		runDir: cmd.Flags().String("run-dir", "", "the run `folder` of the daemon, in place of the configuration's"),
		output: cmd.Flags().StringP("output", "o", outputTable, "the `form`: table, or json"),
	}
}

// ask asks for a path, and prints the answer as JSON where that is wanted;
// otherwise table does.
func (a *asker) ask(path string, answer any, table func() error) error {
	if *a.output != outputTable && *a.output != outputJSON {
		return usageError{fmt.Errorf("--output %q is not one of table, json", *a.output)}
	}
	c, err := cleanupConfig(*a.config, *a.runDir, a.cmd.Flags().Changed("config"))
	if err != nil {
		return err
	}
	err = admin.Get(a.cmd.Context(), filepath.Join(c.RunDir, "admin.sock"), path, answer)
	switch {
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return fmt.Errorf("%w: needs root, runs as user %d: use sudo", err, os.Geteuid())
	case errors.Is(err, admin.ErrNoDaemon) && redirect.Enrolled(c.RunDir) > 0:
		return fmt.Errorf("%w: pods that are enrolled there, %d, are refused what they open to the mesh until one runs (`ztunnel run`); `ztunnel cleanup` releases them", err, redirect.Enrolled(c.RunDir))
	case errors.Is(err, admin.ErrNoDaemon):
		return fmt.Errorf("%w: start one with `ztunnel run --config FILE`, or, where it has another run folder, name that with --run-dir or its configuration with --config", err)
	case err != nil:
		return err
	}
	if *a.output == outputTable {
		return table()
	}
	e := json.NewEncoder(a.cmd.OutOrStdout())
	e.SetIndent("", "  ")
	return e.Encode(answer)
}

// or is text, or what stands for nothing in a table.
func or(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

// oneLine keeps a table's row together.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
