// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-mesh/culvert/config"
)

// call runs ztunnel in this process.
func call(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = execute(args, &out, &err)
	return code, out.String(), err.String()
}

// files writes files into a new folder, and returns the folder.
func files(t *testing.T, content map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range content {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestExitCodes: what they print is in testdata/*.txtar.
func TestExitCodes(t *testing.T) {
	dir := files(t, map[string]string{
		"config.yaml": "runDir: run\n", "bad.yaml": "node:\n  nam: x\n",
		"bad-files.yaml": "runDir: run\nidentity: {ca: {dir: ca}}\npods: {file: pods.yaml}\nworkloads: {file: none.yaml}\n",
		"pods.yaml":      "pods:\n- name: web\n",
	})
	in := func(name string) string { return filepath.Join(dir, name) }
	if code, _, stderr := call(t, "ca", "init", "--dir", in("root")); code != exitOK {
		t.Fatal(stderr)
	}
	broken := answering(t, "/status", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "out of order", http.StatusInternalServerError)
	})
	for name, tt := range map[string]struct {
		args []string
		want int
	}{
		"good":                    {[]string{"version"}, exitOK},
		"nothing":                 {nil, exitOK},
		"an unknown command":      {[]string{"runn"}, exitUsage},
		"an unknown one of ca":    {[]string{"ca", "int"}, exitUsage},
		"an unknown flag":         {[]string{"run", "--confg", "x"}, exitUsage},
		"an argument too many":    {[]string{"version", "x"}, exitUsage},
		"one that is not listed":  {[]string{"log-level", "loud"}, exitUsage},
		"a missing flag":          {[]string{"ca", "intermediate", "--root", dir}, exitUsage},
		"two flags that exclude":  {[]string{"connections", "--plaintext", "--refused"}, exitUsage},
		"a form":                  {[]string{"status", "-o", "xml"}, exitUsage},
		"an interval":             {[]string{"status", "--watch=1ms"}, exitUsage},
		"a bad file":              {[]string{"config", "--config", in("bad.yaml")}, exitUsage},
		"bad files that it names": {[]string{"config", "--check", "--config", in("bad-files.yaml")}, exitUsage},
		"a bad file to run":       {[]string{"run", "--config", in("bad.yaml")}, exitUsage},
		"a missing file":          {[]string{"run", "--config", in("none.yaml")}, exitUsage},
		"a bad file of a cleanup": {[]string{"cleanup", "--config", in("bad.yaml")}, exitUsage},
		"a cleanup without one":   {[]string{"cleanup", "--config", in("none.yaml")}, exitUsage},
		"a bad file to ask by":    {[]string{"status", "--config", in("bad.yaml")}, exitUsage},
		"no daemon":               {[]string{"status", "--config", in("config.yaml")}, exitFailure},
		"no daemon to watch":      {[]string{"status", "--config", in("config.yaml"), "--watch"}, exitFailure},
		"a broken daemon":         {[]string{"status", "--run-dir", broken}, exitFailure},
		"one that knows it not":   {[]string{"workloads", "--run-dir", broken}, exitFailure},
		"a trust domain":          {[]string{"ca", "init", "--dir", in("x"), "--trust-domain", "A b"}, exitUsage},
		"an authority twice":      {[]string{"ca", "init", "--dir", in("root")}, exitFailure},
		"no root to sign with":    {[]string{"ca", "intermediate", "--root", dir, "--out", in("n2")}, exitUsage},
		"an empty folder":         {[]string{"ca", "inspect", "--dir", dir}, exitUsage},
		"a report that is there":  {[]string{"bugreport", "--config", in("config.yaml"), "--out", in("bad.yaml")}, exitFailure},
	} {
		t.Run(name, func(t *testing.T) {
			if code, _, stderr := call(t, tt.args...); code != tt.want {
				t.Errorf("exit code %d, want %d: %s", code, tt.want, stderr)
			}
		})
	}
}

// TestEveryCommandHasAnExample: who asks for help sees how it is called.
func TestEveryCommandHasAnExample(t *testing.T) {
	var look func(path string, list []*cobra.Command)
	look = func(path string, list []*cobra.Command) {
		for _, c := range list {
			at := path + " " + c.Name()
			if len(c.Commands()) > 0 {
				look(at, c.Commands())
				continue
			}
			if !strings.HasPrefix(c.Example, "  ") || !strings.Contains(c.Example, at) {
				t.Errorf("%s has the example %q", at, c.Example)
			}
			if strings.HasSuffix(c.Short, ".") || c.Args == nil {
				t.Errorf("%s: %q, and its arguments are not checked: %t", at, c.Short, c.Args == nil)
			}
		}
	}
	look("ztunnel", commands())
}

func TestCleanupFindsItsRunFolder(t *testing.T) {
	dir := files(t, map[string]string{"config.yaml": "runDir: here\n", "bad.yaml": "x: y\n"})
	for name, tt := range map[string]struct {
		path, runDir string
		asked        bool
		want         string
	}{
		"of the file":                  {filepath.Join(dir, "config.yaml"), "", true, filepath.Join(dir, "here")},
		"of the default file":          {filepath.Join(dir, "config.yaml"), "", false, filepath.Join(dir, "here")},
		"of no file":                   {filepath.Join(dir, "none.yaml"), "", false, config.Default("/").RunDir},
		"as told, past a broken file":  {filepath.Join(dir, "bad.yaml"), "/run/x", true, "/run/x"},
		"as told, past a missing file": {filepath.Join(dir, "none.yaml"), "/run/x/../y", true, "/run/y"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := cleanupConfig(tt.path, tt.runDir, tt.asked)
			if err != nil || c.RunDir != tt.want {
				t.Errorf("got %v, %v; want %s", c, err, tt.want)
			}
		})
	}
}

// TestCleanupOfNothing needs root, as cleanup does.
func TestCleanupOfNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	dir := filepath.Join(t.TempDir(), "run")
	code, stdout, stderr := call(t, "cleanup", "--run-dir", dir)
	if code != exitOK || !strings.Contains(stdout, "nothing to clean up in "+dir) {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
}

// builtIn is the folder of the binary; empty: it was not built.
var builtIn string

// build makes the binary, once, so that main, its exit code and the linker's version
// are in the tests. Everybody may run it.
func build(t *testing.T) string {
	t.Helper()
	if builtIn != "" {
		return filepath.Join(builtIn, "ztunnel")
	}
	dir, err := os.MkdirTemp("", "ztunnel-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-ldflags", "-X main.version=v9.9.9", "-o", filepath.Join(dir, "ztunnel"), ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		t.Fatalf("build: %v\n%s", err, out)
	}
	builtIn = dir
	return filepath.Join(dir, "ztunnel")
}

func TestBinary(t *testing.T) {
	bin := build(t)
	out, err := exec.Command(bin, "version").Output()
	if err != nil || !strings.HasPrefix(string(out), "Culvert ztunnel v9.9.9 (") {
		t.Errorf("%s, %v", out, err)
	}
	cmd := exec.Command(bin, "run", "--config", filepath.Join(t.TempDir(), "none.yaml"))
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	if code := cmd.ProcessState.ExitCode(); code != exitUsage {
		t.Errorf("exit code %d (%v), want %d", code, err, exitUsage)
	}
}
