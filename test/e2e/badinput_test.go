// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

var rewrite = flag.Bool("rewrite", false, "write testdata/badinput.txt and docs/cli.md anew from what is said")

// said is the page of errors: what ztunnel says of each case.
type said struct {
	path string
	mu   sync.Mutex        // guards what follows, and orders scrapes
	page map[string]string // by kind and name
	got  map[string]string
}

// readSaid reads the page. Each case is a line with its name and an indented one
// with the error; a line in brackets begins a kind.
func readSaid(t *testing.T) *said {
	t.Helper()
	s := &said{path: filepath.Join("testdata", "badinput.txt"), page: map[string]string{}, got: map[string]string{}}
	data, err := os.ReadFile(s.path)
	if err != nil && !*rewrite {
		t.Fatal(err)
	}
	var kind, name string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasPrefix(line, "["):
			kind = strings.Trim(line, "[]")
		case strings.HasPrefix(line, "    "):
			s.page[kind+"/"+name] = strings.TrimSpace(line)
		case !strings.HasPrefix(line, "#"):
			name = line
		}
	}
	return s
}

var moment = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)

// holds compares an error with the page. dir is where the files are.
func (s *said) holds(t *testing.T, kind, name, dir, err string) {
	t.Helper()
	err = moment.ReplaceAllString(strings.ReplaceAll(err, dir+"/", ""), "(time)")
	if root := lab.CgroupRoot(); root != "" {
		err = strings.ReplaceAll(err, root, "(cgroup2)")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := kind + "/" + name
	s.got[key] = err
	if want := s.page[key]; err != want && !*rewrite {
		t.Errorf("%s\ngot  %s\nwant %s", key, err, want)
	}
}

// write is what -rewrite does.
func (s *said) write(t *testing.T) {
	t.Helper()
	if !*rewrite {
		return
	}
	var b strings.Builder
	b.WriteString("# What ztunnel says of each file that is wrong. TestBadInput holds it to this;\n# with -rewrite it writes it anew.\n")
	for _, k := range kinds {
		fmt.Fprintf(&b, "\n[%s]\n", k.name)
		for _, c := range k.cases {
			fmt.Fprintf(&b, "%s\n    %s\n", c.name, s.got[k.name+"/"+c.name])
		}
	}
	if err := os.WriteFile(s.path, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// besides is behind the name of a file that is about to be put in place.
const besides = ".bad"

// goodFiles are those beside the configuration. The ca's folder is made apart.
func goodFiles(dir string) error {
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "policy.yaml"), []byte(noRules), 0o600),
		os.WriteFile(filepath.Join(dir, "trust.yaml"), []byte("trust:\n- domain: partner.example\n  roots: [partner.pem]\n"), 0o600),
		os.WriteFile(filepath.Join(dir, "partner.pem"), rootOf(nil), 0o600))
}

// spoil makes what a case has at path, from a copy of good where that is a folder.
func (c badFile) spoil(path, good string) error {
	if info, err := os.Stat(good); err == nil && info.IsDir() {
		if err := os.CopyFS(path, os.DirFS(good)); err != nil {
			return err
		}
		if err := os.Chmod(path, 0o700); err != nil {
			return err
		}
		keys, err := filepath.Glob(filepath.Join(path, "*"))
		for _, k := range keys {
			err = errors.Join(err, os.Chmod(k, 0o600))
		}
		if err != nil {
			return err
		}
	}
	if c.make != nil {
		return c.make(path)
	}
	return os.WriteFile(path, []byte(c.text), 0o600)
}

// Each wrong file gives one error, by check and at the start, in which the file,
// the place and the mend are; and changes nothing.
func TestBadInput(t *testing.T) {
	userSpace(t)
	s := readSaid(t)
	e := setup(t)
	n := e.Nodes[0]
	e.takes(3 * time.Minute * lab.Slowness())
	for _, n := range e.Nodes {
		e.must(goodFiles(n.Dir))
	}
	settings := map[string]any{
		"policy": map[string]any{"file": "policy.yaml"},
		"identity": map[string]any{
			"ca":        map[string]any{"dir": "ca", "leafTTL": "20s"}, // looked at each second
			"trustFile": "trust.yaml",
		},
	}
	e.must(n.Configure(lab.DaemonConfig{Settings: settings, Pods: n.Pods[:2]}))

	count := 0
	t.Run("start", func(t *testing.T) {
		for _, k := range kinds {
			count += len(k.cases)
			for _, c := range k.cases {
				if c.when == whileRunning {
					continue
				}
				t.Run(k.name+"/"+c.name, func(t *testing.T) {
					t.Parallel()
					e.refused(t, s, k.name, k.file, c)
				})
			}
		}
	})
	// The control: the same files without a mistake.
	if out, err := exec.CommandContext(e.ctx, ztunnel, "config", "--check", "--config", filepath.Join(n.Dir, "config.yaml")).CombinedOutput(); err != nil {
		t.Errorf("the good files: %v\n%s", err, out)
	}
	t.Logf("%d cases", count)
	if count < 100 {
		t.Errorf("%d cases: some were lost", count)
	}

	d := e.start(lab.DaemonConfig{Settings: settings})
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	traffic := e.steady(e.Pod(1, 1), app.Addr(4))
	before := e.snapshot(d[0])
	t.Run("running", func(t *testing.T) {
		var together sync.WaitGroup   // as parallel subtests, but as many at once as there are
		for _, k := range kinds[1:] { // the configuration itself is read once
			together.Go(func() {
				t.Run(k.name, func(t *testing.T) { e.kept(t, s, d[0], k.name, k.file, k.cases) })
			})
		}
		together.Wait()
	})
	traffic.whole(t, 1)
	e.settled(d[0], 2)
	// Good workloads and rules are published as often as they are taken again.
	if after := e.snapshot(d[0]); len(after.Pods) != len(before.Pods) {
		t.Errorf("%d pods, and %d before", len(after.Pods), len(before.Pods))
	}
	s.write(t)
}

// refused runs the check and the daemon with one wrong file.
func (e *env) refused(t *testing.T, s *said, kind, first string, c badFile) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"config.yaml", "workloads.yaml", "pods.yaml", "policy.yaml", "trust.yaml", "partner.pem"} {
		data, err := os.ReadFile(filepath.Join(e.Nodes[0].Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		data = bytes.ReplaceAll(data, []byte(e.Nodes[0].Dir), []byte(dir))
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := (badFile{make: func(string) error { return nil }}).spoil(filepath.Join(dir, "ca"), filepath.Join(e.Nodes[0].Dir, "ca")); err != nil {
		t.Fatal(err)
	}
	file := first
	if c.file != "" {
		file = c.file
	}
	path := filepath.Join(dir, file)
	if err := errors.Join(os.Rename(path, path+".good"), c.spoil(path, path+".good")); err != nil {
		t.Fatal(err)
	}
	before := tree(t, dir)
	for _, args := range [][]string{{"config", "--check"}, {"run"}} {
		ctx, cancel := context.WithTimeout(e.ctx, 15*time.Second*lab.Slowness())
		cmd := exec.CommandContext(ctx, ztunnel, append(args, "--config", filepath.Join(dir, "config.yaml"))...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		var err error
		if c.obedient {
			err = startWithout(e.Nodes[0].NS, cmd, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH)
		} else {
			err = e.Nodes[0].NS.Do(cmd.Start)
		}
		if err == nil {
			err = cmd.Wait()
		}
		cancel()
		if code := cmd.ProcessState.ExitCode(); code != 2 {
			t.Errorf("%s: exit code %d (%v), want 2\n%s", args[0], code, err, &stderr)
			if out, err := exec.Command(ztunnel, "cleanup", "--run-dir", filepath.Join(dir, "run")).CombinedOutput(); err != nil {
				t.Errorf("cleanup: %v\n%s", err, out)
			}
		}
		text, ok := strings.CutPrefix(strings.TrimSuffix(stderr.String(), "\n"), "ztunnel: ")
		if !ok || strings.Contains(text, "\n") || len(text) > 600 {
			t.Errorf("%s: want one error of one line, got\n%.2000s", args[0], &stderr)
		}
		s.holds(t, kind, c.name, dir, text)
		if after := tree(t, dir); after != before {
			t.Errorf("%s has changed files:\n%s\nbefore:\n%s", args[0], after, before)
		}
	}
	sum := sha256.Sum256([]byte(filepath.Join(dir, "run")))
	if pins := filepath.Join("/sys/fs/bpf/culvert", hex.EncodeToString(sum[:6])); exists(pins) {
		t.Errorf("%s was pinned", pins)
	}
}

// watchReads returns what says, once for each time, that a file was opened since.
func watchReads(t *testing.T, path string) func() error {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	events := make([]byte, 4096)
	return func() error {
		if _, err := unix.Read(fd, events); err != nil {
			return fmt.Errorf("it was not opened: %w", err)
		}
		return nil
	}
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// tree lists what is in a folder.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(&b, path, info.Mode(), info.Size(), info.ModTime().UnixNano())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// snapshot is the status, as far as it is looked at here.
type daemonStatus struct {
	Files []struct{ File, Error string }
	Pods  []struct{ Pod, State string }
}

func (e *env) snapshot(d *lab.Daemon) (st daemonStatus) {
	e.t.Helper()
	e.must(json.Unmarshal([]byte(e.status(d)), &st))
	return st
}

// kept puts each wrong file in the place of the good one under a running daemon,
// and back: it is named once, in log, metric and status, and changes nothing.
func (e *env) kept(t *testing.T, s *said, d *lab.Daemon, kind, first string, cases []badFile) {
	t.Helper()
	e = e.in(t)
	until := func(what string, f func() error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(e.ctx, 20*time.Second*lab.Slowness())
		defer cancel()
		if err := lab.Until(ctx, what, f); err != nil {
			t.Fatal(err)
		}
	}
	// The metrics are served to two at once.
	counted := func(result string) float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return e.sum(d, "culvert_config_reloads_total", "file", kind, "result", result)
	}
	want, looked := 0, 0
	for _, c := range cases {
		if c.when == atStart {
			continue
		}
		want++
		file := first
		if c.file != "" {
			file = c.file
		}
		path := filepath.Join(d.Node.Dir, file)
		if err := c.spoil(path+besides, path); err != nil {
			t.Fatal(err)
		}
		// Both at once, whatever they are.
		swap := func() {
			flags := uint(unix.RENAME_EXCHANGE)
			from, to := path+besides, path
			if !exists(from) { // "gone"
				from, to, flags = path, path+besides, 0
			} else if !exists(to) {
				flags = 0
			}
			if err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags); err != nil {
				t.Fatal(err)
			}
		}
		good := counted("ok")
		swap()
		var text string
		until(fmt.Sprintf("the wrong file %q is counted", c.name), func() error {
			if n := counted("error"); n != float64(want) {
				return fmt.Errorf("%v of %d are", n, want)
			}
			for _, f := range e.snapshot(d).Files {
				if f.File == kind {
					text = f.Error
				}
			}
			if text == "" {
				return errors.New("the status does not know it")
			}
			return nil
		})
		s.holds(t, kind, c.name, d.Node.Dir, text)
		log, err := os.ReadFile(d.LogFile)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(string(log), "\n")
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, strconv.Quote(text)) }) {
			t.Errorf("%s: the log does not name %s", c.name, text)
		}
		looks := path // at what is opened each time that it is read
		if kind == "ca" {
			looks = filepath.Join(path, "root.pem")
		}
		if info, err := os.Stat(looks); err == nil && info.Mode().IsRegular() && looked < 2 {
			looked++
			// It is not named again when it is read again: that is counted at the end.
			reads := watchReads(t, looks)
			for range 2 {
				if err := os.Chtimes(looks, time.Time{}, time.Now()); err != nil {
					t.Fatal(err)
				}
				until(fmt.Sprintf("%q is read again", c.name), reads)
			}
		}
		swap()
		if err := os.RemoveAll(path + ".bad"); err != nil {
			t.Fatal(err)
		}
		until(fmt.Sprintf("the good file is taken again after %q", c.name), func() error {
			if n := counted("ok"); n <= good {
				return fmt.Errorf("%v reloads, and %v before", n, good)
			}
			return nil
		})
	}
	if n := counted("error"); n != float64(want) {
		t.Errorf("%v errors of %s are counted, of %d wrong files", n, kind, want)
	}
	log, err := os.ReadFile(d.LogFile)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(log), "file="+kind+" err="); n != want {
		t.Errorf("%d errors of %s are in the log, of %d wrong files", n, kind, want)
	}
}
