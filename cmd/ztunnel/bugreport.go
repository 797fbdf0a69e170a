// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/daemon"
	"github.com/culvert-mesh/culvert/redirect"
)

func bugreportCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bugreport",
		Short: "Gather what is needed to look into a problem, in one file",
		Long: `Gather what is needed to look into a problem: the status, pods, connections, the last
refusals, workloads, certificates, metrics, goroutines, the last lines of the log, the
configuration, and facts of the kernel and of the daemon's cgroup. What cannot be had,
such as all of the daemon's where none runs, is named in errors.txt.

No keys are in it, nor any byte of a connection. Names, addresses and identities of
pods and workloads are: look at it before you give it away. Needs root.`,
		Example: "  ztunnel bugreport\n  ztunnel bugreport --out /tmp/report.tar.gz\n  ztunnel bugreport --out - | tar -tz",
		Args:    cobra.NoArgs,
	}
	a := newAsker(cmd)
	path := cmd.Flags().String("out", "", "the `file` to make, - for standard output (default: culvert-bugreport-TIME.tar.gz)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		folder := "culvert-bugreport-" + time.Now().UTC().Format("20060102-150405")
		name := *path
		if name == "" {
			name = folder + ".tar.gz"
		}
		if name == "-" {
			return bugreport(cmd.Context(), cmd.OutOrStdout(), a, folder)
		}
		// Only its user reads it, and nobody's file is written over.
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return fmt.Errorf("make report: %w", err)
		}
		if err := errors.Join(bugreport(cmd.Context(), f, a, folder), f.Close()); err != nil {
			return errors.Join(err, os.Remove(name))
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "made %s; it has no keys, but names and addresses: look at it before you give it away\n", name)
		return err
	}
	return cmd
}

// part is a file of a report. The list of them is closed: nothing comes into a
// report by lying in a folder.
type part struct {
	name string
	read func(ctx context.Context) ([]byte, error)
}

func parts(a *asker) []part {
	asked := func(name, path string) part {
		return part{name, func(ctx context.Context) (b []byte, err error) {
			err = a.get(ctx, path, &b)
			return b, err
		}}
	}
	return []part{
		{"version.txt", func(context.Context) ([]byte, error) { return []byte(versionText()), nil }},
		asked("status.json", "/status"), // the pods too
		asked("connections.json", "/connections"),
		asked("refused.json", "/connections/refused"),
		asked("plaintext.json", "/connections/plaintext"),
		asked("workloads.json", "/workloads"),
		asked("certs.json", "/certs"),
		asked("metrics.txt", "/metrics"),
		asked("log.txt", "/log"),
		asked("goroutines.txt", "/debug/pprof/goroutine?debug=1"),
		{"config.yaml", func(ctx context.Context) ([]byte, error) {
			path := *a.config
			var s daemon.Status // its own file, where it runs
			if a.get(ctx, "/status", &s) == nil && s.Config != "" {
				path = s.Config
			}
			c, err := config.Load(path)
			if err != nil {
				return nil, err
			}
			return c.YAML()
		}},
		{"kernel.txt", func(context.Context) ([]byte, error) { return kernelFacts() }},
		{"cgroup.txt", func(ctx context.Context) ([]byte, error) {
			var s daemon.Status
			if err := a.get(ctx, "/status", &s); err != nil {
				return nil, err
			}
			return cgroupFacts(s.PID)
		}},
	}
}

// bugreport writes the report. Parts that cannot be had are named in it.
func bugreport(ctx context.Context, w io.Writer, a *asker, folder string) error {
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	add := func(name string, data []byte) error {
		h := &tar.Header{Name: folder + "/" + name, Mode: 0o600, Size: int64(len(data)), ModTime: time.Now()}
		if err := t.WriteHeader(h); err != nil {
			return fmt.Errorf("write report: %w", err)
		}
		if _, err := t.Write(data); err != nil {
			return fmt.Errorf("write report: %w", err)
		}
		return nil
	}
	// All at once: a daemon that is stuck, which is what some reports are about,
	// has each of them wait for as long as an answer may take.
	list := parts(a)
	data, errs := make([][]byte, len(list)), make([]error, len(list))
	var wg sync.WaitGroup
	for i, p := range list {
		wg.Go(func() { data[i], errs[i] = p.read(ctx) })
	}
	wg.Wait()
	var lacks strings.Builder
	for i, p := range list {
		switch err := errs[i]; {
		case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
			return err
		case err != nil:
			fmt.Fprintf(&lacks, "%s: %v\n", p.name, err)
			continue
		}
		if err := add(p.name, data[i]); err != nil {
			return err
		}
	}
	if lacks.Len() > 0 {
		if err := add("errors.txt", []byte(lacks.String())); err != nil {
			return err
		}
	}
	if err := errors.Join(t.Close(), z.Close()); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

// maxFact bounds what is read of a file of the kernel's.
const maxFact = 64 << 10

// facts reads files that are there, each behind its name.
func facts(b *strings.Builder, paths ...string) {
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		data, err := io.ReadAll(io.LimitReader(f, maxFact))
		f.Close()
		if err != nil {
			continue
		}
		fmt.Fprintf(b, "%s: %s\n", path, strings.ReplaceAll(strings.TrimSpace(string(data)), "\n", "\n\t"))
	}
}

// kernelFacts are what the redirection depends on.
func kernelFacts() ([]byte, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("look at kernel: %w", err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "kernel: %s %s %s\n", unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Version[:]), unix.ByteSliceToString(u.Machine[:]))
	fmt.Fprintf(&b, "cpus: %d\nother mounts than the first process: %t\nother instances' run folders: %s\n", runtime.NumCPU(), otherMounts(), strings.Join(redirect.RunDirs(), " "))
	facts(&b, "/etc/os-release", "/proc/loadavg", "/proc/pressure/cpu", "/proc/pressure/memory",
		"/proc/sys/net/core/somaxconn", "/proc/sys/net/ipv4/ip_local_port_range", "/proc/sys/net/ipv4/conf/all/rp_filter",
		"/proc/sys/net/core/bpf_jit_enable", "/proc/sys/kernel/unprivileged_bpf_disabled", "/proc/sys/fs/nr_open", "/sys/kernel/security/lsm")
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("look at mounts: %w", err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " - cgroup") || strings.Contains(line, " - bpf ") {
			fmt.Fprintf(&b, "mount: %s\n", strings.TrimSpace(line))
		}
	}
	return []byte(b.String()), nil
}

// cgroupFacts are the bounds of a process, and what it has used of them.
func cgroupFacts(pid int) ([]byte, error) {
	proc := fmt.Sprintf("/proc/%d", pid)
	member, err := os.ReadFile(filepath.Join(proc, "cgroup"))
	if err != nil {
		return nil, fmt.Errorf("look at the daemon's cgroup: %w", err)
	}
	var b strings.Builder
	facts(&b, proc+"/cgroup", proc+"/limits", proc+"/status", proc+"/oom_score_adj")
	for line := range strings.Lines(string(member)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
			for _, name := range []string{"memory.current", "memory.peak", "memory.max", "memory.high", "memory.events", "cpu.max", "cpu.stat", "pids.current", "pids.max"} {
				facts(&b, filepath.Join(root, path, name))
			}
		}
	}
	return []byte(b.String()), nil
}
