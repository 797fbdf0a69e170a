// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v4"

	"github.com/culvert-mesh/culvert/admin"
	"github.com/culvert-mesh/culvert/internal/cli"
	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/redirect"
)

// asker is the flags of a command that asks the daemon, and how it asks.
type asker struct {
	cmd            *cobra.Command
	config, runDir *string
	output         *string        // nil: the answer has one form
	watch          *time.Duration // nil: it is asked once
}

// Forms of the answer.
const (
	outputTable = "table"
	outputJSON  = "json"
	outputYAML  = "yaml"
)

func outputs() []string { return []string{outputTable, outputJSON, outputYAML} }

const (
	watchEvery = 2 * time.Second
	// watchOften is the shortest time between two looks.
	watchOften = 100 * time.Millisecond
)

// newAsker adds the flags that say which daemon.
func newAsker(cmd *cobra.Command) *asker {
	return &asker{
		cmd:    cmd,
		config: configFlag(cmd),
		runDir: cmd.Flags().String("run-dir", "", "the run `folder` of the daemon, in place of the configuration's"),
	}
}

// watched adds --watch.
func (a *asker) watched() *asker {
	a.watch = a.cmd.Flags().Duration("watch", 0, "ask again after each `interval`, and show the new answer, until Ctrl-C")
	a.cmd.Flag("watch").NoOptDefVal = watchEvery.String()
	return a
}

// formed adds --output.
func (a *asker) formed() *asker {
	a.output = a.cmd.Flags().StringP("output", "o", outputTable, "the `form`: "+strings.Join(outputs(), ", "))
	_ = a.cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputs(), cobra.ShellCompDirectiveNoFileComp))
	return a
}

// listed adds --watch and --output.
func (a *asker) listed() *asker { return a.formed().watched() }

// check refuses flags that make no sense, before anything is asked.
func (a *asker) check() error {
	if a.output != nil && !slices.Contains(outputs(), *a.output) {
		return usageError{fmt.Errorf("--output %q is not one of %s", *a.output, strings.Join(outputs(), ", "))}
	}
	if a.watch != nil && *a.watch != 0 && *a.watch < watchOften {
		return usageError{fmt.Errorf("--watch %s is too often: %s at least, such as --watch=2s", *a.watch, watchOften)}
	}
	return nil
}

// show asks for a path and prints the answer in the form that is wanted: as a table
// for people, or what of makes of it as JSON or YAML. With --watch it goes on.
func show[T, V any](a *asker, path string, of func(T) V, table func(V, time.Time) string) error {
	return a.repeat(func(ctx context.Context) (string, error) {
		var answer T
		if err := a.get(ctx, path, &answer); err != nil {
			return "", err
		}
		return form(*a.output, of(answer), table)
	})
}

// whole is the of of an answer that is shown as it is.
func whole[T any](answer T) T { return answer }

// form is a value as text.
func form[V any](output string, v V, table func(V, time.Time) string) (string, error) {
	if output == outputTable {
		return table(v, time.Now()), nil
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return "", fmt.Errorf("write answer: %w", err)
	}
	if output == outputJSON {
		return b.String(), nil
	}
	var n yaml.Node // JSON is YAML, and a node keeps the order
	err := yaml.Load(b.Bytes(), &n)
	if err != nil {
		return "", fmt.Errorf("write answer: %w", err)
	}
	block(&n)
	text, err := yaml.Dump(&n, yaml.WithLineWidth(-1), yaml.WithQuotePreference(yaml.QuoteDouble))
	if err != nil {
		return "", fmt.Errorf("write answer: %w", err)
	}
	return string(text), nil
}

// block takes the brackets and quotation marks of JSON away.
func block(n *yaml.Node) {
	n.Style = 0
	for _, child := range n.Content {
		block(child)
	}
}

// repeat prints what once returns, once, or with --watch until it is told to end.
// What goes wrong at the first time ends it; later it is shown, and tried again: a
// daemon that is started anew is what one may want to watch.
func (a *asker) repeat(once func(context.Context) (string, error)) error {
	if err := a.check(); err != nil {
		return err
	}
	out := a.cmd.OutOrStdout()
	if a.watch == nil || *a.watch == 0 {
		text, err := once(a.cmd.Context())
		if err == nil {
			_, err = fmt.Fprint(out, text)
		}
		return err
	}
	ctx, stop := signal.NotifyContext(a.cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	tick := time.NewTicker(*a.watch)
	defer tick.Stop()
	screen := cli.NewScreen(out)
	for first := true; ; first = false {
		text, err := once(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && first:
			return err
		case err != nil && screen.IsTerminal():
			text = fmt.Sprintf("ztunnel: %v\n", err)
		case err != nil:
			fmt.Fprintf(a.cmd.ErrOrStderr(), "ztunnel: %v\n", err)
		case first || screen.IsTerminal():
		case a.output == nil || *a.output == outputTable:
			text = "\n" + text
		case *a.output == outputYAML:
			text = "---\n" + text
		}
		if err := screen.Show(text); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// get asks the daemon for a path.
func (a *asker) get(ctx context.Context, path string, answer any) error {
	return a.reach(func(socket string) error { return admin.Get(ctx, socket, path, answer) })
}

// reach finds the socket for ask, and says what to do about its error.
func (a *asker) reach(ask func(socket string) error) error {
	c, err := cleanupConfig(*a.config, *a.runDir, a.cmd.Flags().Changed("config"))
	if err != nil {
		return err
	}
	err = ask(admin.Socket(c.RunDir))
	switch {
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return fmt.Errorf("%w: needs root, runs as user %d: use sudo", err, os.Geteuid())
	case !errors.Is(err, admin.ErrNoDaemon):
		return err
	}
	if others := otherDaemons(c.RunDir); len(others) > 0 {
		err = fmt.Errorf("%w: of this machine's others, the run folder is %s: name one with --run-dir", err, strings.Join(others, ", "))
	}
	if n := redirect.Enrolled(c.RunDir); n > 0 {
		return fmt.Errorf("%w: pods that are enrolled there, %d, are refused what they open to the mesh until one runs (`ztunnel run`); `ztunnel cleanup` releases them", err, n)
	}
	if otherMounts() {
		return fmt.Errorf("%w: and this process sees other mounts than the node's first one does, as `ip netns exec` or a container has them: use `nsenter --target 1 --mount` to ask from where ztunnel runs", err)
	}
	return fmt.Errorf("%w: start one with `ztunnel run --config FILE`, or, where it has another run folder, name that with --run-dir or its configuration with --config", err)
}

// otherDaemons are the run folders of instances whose socket is there.
func otherDaemons(runDir string) (out []string) {
	for _, dir := range redirect.RunDirs() {
		if _, err := os.Stat(admin.Socket(dir)); err == nil && dir != runDir {
			out = append(out, dir)
		}
	}
	return out
}

// otherMounts says whether this process is in another mount namespace than the
// first one that it sees.
func otherMounts() bool {
	ours, err := os.Readlink("/proc/self/ns/mnt")
	first, ferr := os.Readlink("/proc/1/ns/mnt")
	return err == nil && ferr == nil && ours != first
}

// namedNetns says whether this process is in a network namespace that has a name, as
// `ip netns exec` brings it to one.
func namedNetns() bool {
	ours, err := os.Stat("/proc/self/ns/net")
	if err != nil {
		return false
	}
	names, _ := filepath.Glob(filepath.Join(netns.Dir, "*")) // the pattern is good
	return slices.ContainsFunc(names, func(name string) bool {
		named, err := os.Stat(name)
		return err == nil && os.SameFile(ours, named)
	})
}

// or is text, or what stands for nothing in a table.
func or(text string) string { return cmp.Or(text, "-") }

// oneLine keeps a table's row together.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
