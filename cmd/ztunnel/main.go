// SPDX-License-Identifier: Apache-2.0

// Command ztunnel is Culvert's data plane of a node, and what an operator needs
// beside it. It has flags, signals and exit codes; what they mean is done by the
// packages.
//
// Exit codes: 0 when all went well, 1 when something failed, 2 when the command
// line or a file that it names is wrong.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/config/strict"
	"github.com/culvert-mesh/culvert/internal/input"
)

// version is set by the linker, see the Makefile.
var version = ""

// defaultConfig is where the configuration is looked for.
const defaultConfig = "/etc/culvert/config.yaml"

// Exit codes.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

func main() {
	os.Exit(execute(os.Args[1:], os.Stdout, os.Stderr))
}

// usageError is a mistake of who called, not of the machine.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func execute(args []string, stdout, stderr io.Writer) int {
	begun := false // the arguments were good
	root := group(&cobra.Command{
		Use:   "ztunnel",
		Short: "Culvert: mutual TLS for the pods of a node, transparently",
		Long: `ztunnel is Culvert's data plane: it carries the TCP traffic of this node's pods
over mutual TLS, with a certificate for each workload's identity. Istio's data plane
has the same name, and speaks the same protocol: "ztunnel version" says whose this is.

"run" is the daemon. Most others ask it, over the socket in its run folder, which is
root's; "check", "config", "ca", "version" and "completion" need no daemon, "cleanup"
wants none, and "bugreport" makes do without one.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		PersistentPreRun:  func(*cobra.Command, []string) { begun = true },
	})
	root.AddCommand(commands()...)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteC()
	if err == nil {
		return exitOK
	}
	stderr = root.ErrOrStderr()
	fmt.Fprintf(stderr, "ztunnel: %v\n", err)
	var usage usageError
	var content *strict.Error
	var file *input.Error
	switch {
	case !begun || errors.As(err, &usage):
		fmt.Fprintf(stderr, "See %s --help.\n", cmd.CommandPath())
		return exitUsage
	case errors.As(err, &content), errors.As(err, &file):
		return exitUsage
	}
	return exitFailure
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Say which build this is: Culvert's, not Istio's",
		Example: "  ztunnel version",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprint(cmd.OutOrStdout(), versionText())
			return err
		},
	}
}

func versionText() string {
	return fmt.Sprintf("Culvert ztunnel %s (%s, %s/%s)\n", buildVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// buildVersion is the linker's, else the module's as go install knows it.
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
