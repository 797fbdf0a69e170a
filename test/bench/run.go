// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-mesh/culvert/internal/cli"
)

// bench is a run: the sites of all paths, at the same time on one machine, of
// which one works at a time.
type bench struct {
	options
	sites  []*site
	report *report
}

func newBench(ctx context.Context, o options) (b *bench, err error) {
	if err := sweep(ctx); err != nil {
		return nil, err
	}
	limit, err := raiseFiles()
	if err != nil {
		return nil, err
	}
	// A sidecar has two descriptors for each connection.
	const others = 1000
	o.idle = min(o.idle, (limit-others)/2)
	chosen, err := o.binaries.choose(o.paths)
	if err != nil {
		return nil, err
	}
	b = &bench{options: o, report: newReport(o)}
	for _, p := range chosen {
		entry := pathEntry{Name: p.name, Missing: p.path.missing()}
		if entry.Missing == "" {
			b.progress("set up %s", p.name)
			entry.About = p.path.about()
			s, err := openSite(ctx, p)
			if err != nil {
				return nil, errors.Join(err, b.close())
			}
			b.sites = append(b.sites, s)
			if o.setUp != nil {
				if err := o.setUp(ctx, s); err != nil {
					return nil, errors.Join(err, b.close())
				}
			}
			entry.Wire = s.wire
		}
		b.report.Paths = append(b.report.Paths, entry)
	}
	return b, nil
}

// raiseFiles gives this process, and those that it starts, as many descriptors as
// it may have.
func raiseFiles() (int, error) {
	var l syscall.Rlimit
	err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l)
	if err == nil {
		l.Cur = l.Max
		err = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l)
	}
	if err != nil {
		return 0, fmt.Errorf("raise the limit of open files: %w", err)
	}
	return int(min(l.Max, 1<<30)), nil
}

func (b *bench) close() error {
	b.progress("")
	var errs []error
	for _, s := range b.sites {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

func (b *bench) site(name string) *site {
	for _, s := range b.sites {
		if s.name == name {
			return s
		}
	}
	return nil
}

// rounds does every work on every path, in rounds, and keeps what there is after
// each of them.
func (b *bench) rounds(ctx context.Context, all []work) error {
	var list []work
	for _, w := range all {
		if strings.Contains(w.name, b.only) {
			list = append(list, w)
			b.report.Works = append(b.report.Works, workEntry{w.name, w.unit})
		}
	}
	for _, s := range b.sites {
		if len(s.proxies) == 0 {
			continue
		}
		n, err := s.memory(s.lab.Nodes[0])
		if err != nil {
			return err
		}
		b.report.Memory = append(b.report.Memory, memoryEntry{restWork, s.name, float64(n) / 1e6})
	}
	// Before any load: what a process has once taken serves the next connections.
	if b.only == "" && b.idle > 0 {
		if err := b.idleMemory(ctx); err != nil {
			return err
		}
	}
	begin := time.Now()
	for round := range b.options.rounds {
		for i, w := range list {
			// Nobody always comes after the same one.
			for j := range b.sites {
				s := b.sites[(j+round+i)%len(b.sites)]
				if err := ctx.Err(); err != nil {
					return context.Cause(ctx)
				}
				b.progress("round %d of %d: %s, %s", round+1, b.options.rounds, w.name, s.name)
				x, err := s.take(ctx, w)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", w.name, s.name, err)
				}
				x.Round = round + 1
				b.report.Samples = append(b.report.Samples, x)
			}
		}
		took := time.Since(begin)
		b.line("round %d of %d done after %v, %v to go", round+1, b.options.rounds, took.Round(time.Second),
			(took / time.Duration(round+1) * time.Duration(b.options.rounds-round-1)).Round(time.Second))
		if err := b.keep(); err != nil {
			return err
		}
	}
	b.progress("")
	return b.keep()
}

func (b *bench) idleMemory(ctx context.Context) error {
	for _, s := range b.sites {
		if len(s.proxies) == 0 {
			continue
		}
		b.progress("%d idle connections, %s", b.idle, s.name)
		n, err := s.idle(ctx, b.idle)
		if err != nil {
			return fmt.Errorf("memory of idle connections, %s: %w", s.name, err)
		}
		b.report.Memory = append(b.report.Memory, memoryEntry{idleWork, s.name, float64(n)})
	}
	return nil
}

func (b *bench) keep() error {
	if b.raw == "" {
		return nil
	}
	return b.report.write(b.raw)
}

// progress says on a terminal what is being measured.
func (b *bench) progress(format string, args ...any) {
	if cli.IsTerminal(os.Stderr) {
		fmt.Fprintf(os.Stderr, "\r\033[K"+format, args...)
	}
}

// line says to whoever looks how far it is.
func (b *bench) line(format string, args ...any) {
	b.progress("")
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}
