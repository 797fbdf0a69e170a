// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/config"
)

// cli runs ztunnel in this process.
func cli(t *testing.T, args ...string) (code int, stdout, stderr string) {
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

func good() map[string]string {
	return map[string]string{
		"config.yaml":    "node: {name: n1}\nrunDir: run\npolicy: {file: policy.yaml}\nidentity: {trustFile: trust.yaml}\n",
		"workloads.yaml": "workloads:\n- {name: web, addresses: [10.0.0.1]}\n",
		"pods.yaml":      "pods: []\n",
		"policy.yaml":    "rules: []\nmodes: [{name: legacy, namespace: demo, workload: web, ports: {8080: permissive, 443: strict}}]\n",
		"trust.yaml":     "deny: {serials: [1f]}\n",
	}
}

func TestGoodCommands(t *testing.T) {
	dir := files(t, good())
	conf := filepath.Join(dir, "config.yaml")
	for name, tt := range map[string]struct {
		args []string
		want []string // of standard output
	}{
		"version":              {[]string{"version"}, []string{"Culvert ztunnel ", "go1."}},
		"nothing is help":      {nil, []string{"Culvert's data plane", "cleanup", "version"}},
		"help":                 {[]string{"--help"}, []string{"Culvert's data plane"}},
		"ca is help":           {[]string{"ca"}, []string{"intermediate"}},
		"config":               {[]string{"config", "--config", conf}, []string{"name: n1\n", "runDir: " + dir + "/run\n", "leafTTL: 24h\n"}},
		"config, short":        {[]string{"config", "-c", conf}, []string{"name: n1\n"}},
		"config check":         {[]string{"config", "--check", "--config", conf}, []string{"config.yaml: good\n", "workloads.yaml: good, 1 workload\n", "pods.yaml: good, 0 pods\n", "policy.yaml: good, 0 rules\n", "plaintext for the mesh: strict (default-mode)\nplaintext for demo/web: 443 strict, 8080 permissive (legacy)\n", "trust.yaml: good, 0 further trust domains\n"}},
		"run help":             {[]string{"run", "--help"}, []string{"ztunnel run --config /etc/culvert/config.yaml"}},
		"cleanup help":         {[]string{"cleanup", "--help"}, []string{"ztunnel cleanup --config /etc/culvert/config.yaml"}},
		"config help":          {[]string{"config", "--help"}, []string{"ztunnel config --check"}},
		"version help":         {[]string{"version", "--help"}, []string{"Examples:\n  ztunnel version"}},
		"status help":          {[]string{"status", "--help"}, []string{"ztunnel status --run-dir /run/culvert -o json"}},
		"connections help":     {[]string{"connections", "--help"}, []string{"ztunnel connections --plaintext", "by configuration"}},
		"ca init help":         {[]string{"ca", "init", "--help"}, []string{"ztunnel ca init --dir "}},
		"ca intermediate help": {[]string{"ca", "intermediate", "--help"}, []string{"ztunnel ca intermediate --root "}},
	} {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := cli(t, tt.args...)
			if code != exitOK || stderr != "" {
				t.Fatalf("exit code %d, standard error %q", code, stderr)
			}
			for _, want := range tt.want {
				if !strings.Contains(stdout, want) {
					t.Errorf("no %q in\n%s", want, stdout)
				}
			}
		})
	}
}

func TestBadCommands(t *testing.T) {
	content := good()
	content["bad.yaml"] = "node:\n  nam: x\n"
	content["bad-pods.yaml"] = "pods: {file: pods-bad.yaml}\nworkloads: {file: none.yaml}\n"
	content["pods-bad.yaml"] = "pods:\n- name: web\n"
	dir := files(t, content)
	in := func(name string) string { return filepath.Join(dir, name) }
	caDir := filepath.Join(t.TempDir(), "ca")
	if code, _, stderr := cli(t, "ca", "init", "--dir", caDir); code != exitOK {
		t.Fatal(stderr)
	}
	for name, tt := range map[string]struct {
		args []string
		code int
		want []string // of standard error
	}{
		"an unknown command":       {[]string{"runn"}, exitUsage, []string{`unknown command "runn"`, "See ztunnel --help."}},
		"an unknown command of ca": {[]string{"ca", "int"}, exitUsage, []string{`unknown command "int" for "ztunnel ca"`}},
		"an unknown flag":          {[]string{"run", "--confg", "x"}, exitUsage, []string{"unknown flag: --confg", "See ztunnel run --help."}},
		"an argument too many":     {[]string{"version", "x"}, exitUsage, []string{`"x"`, "See ztunnel version --help."}},
		"a missing configuration":  {[]string{"run", "--config", in("none.yaml")}, exitUsage, []string{in("none.yaml"), "no such file", "--config"}},
		"a bad configuration":      {[]string{"run", "--config", in("bad.yaml")}, exitUsage, []string{in("bad.yaml") + ":2:3: node.nam: unknown key; allowed: name"}},
		"config of a bad one":      {[]string{"config", "--config", in("bad.yaml")}, exitUsage, []string{":2:3: node.nam: unknown key; allowed: name"}},
		"all bad files at once":    {[]string{"config", "--check", "--config", in("bad-pods.yaml")}, exitUsage, []string{"none.yaml: no such file", "pods-bad.yaml:2:3: pods[0].netns: is missing"}},
		"cleanup by a bad one":     {[]string{"cleanup", "--config", in("bad.yaml")}, exitUsage, []string{"unknown key", "--run-dir"}},
		"cleanup by a missing one": {[]string{"cleanup", "--config", in("none.yaml")}, exitUsage, []string{"no such file"}},
		"status of no daemon":      {[]string{"status", "--run-dir", in("nobody")}, exitFailure, []string{"no ztunnel answers at " + in("nobody/admin.sock"), "ztunnel run --config", "--run-dir"}},
		"connections of none":      {[]string{"connections", "--config", in("config.yaml")}, exitFailure, []string{"no ztunnel answers at " + in("run/admin.sock")}},
		"status by a bad one":      {[]string{"status", "--config", in("bad.yaml")}, exitUsage, []string{"unknown key", "--run-dir"}},
		"status in another form":   {[]string{"status", "-o", "yaml"}, exitUsage, []string{`--output "yaml"`, "table, json", "See ztunnel status --help."}},
		"a trust domain":           {[]string{"ca", "init", "--dir", in("x"), "--trust-domain", "A b"}, exitUsage, []string{`--trust-domain "A b"`, "cluster.local"}},
		"a CA twice":               {[]string{"ca", "init", "--dir", caDir}, exitFailure, []string{"is there already"}},
		"no place to make it":      {[]string{"ca", "intermediate", "--root", caDir}, exitUsage, []string{"--out is needed", "See ztunnel ca intermediate --help."}},
		"no root to make it from":  {[]string{"ca", "intermediate", "--root", dir, "--out", in("n2")}, exitUsage, []string{dir}},
	} {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := cli(t, tt.args...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			for _, want := range tt.want {
				if !strings.Contains(stderr, want) {
					t.Errorf("no %q in\n%s", want, stderr)
				}
			}
			if strings.Contains(stdout, "Usage:") || strings.Contains(stderr, "Usage:") {
				t.Errorf("the mistake is buried in usage:\n%s%s", stdout, stderr)
			}
		})
	}
}

func TestCAOfTwoNodes(t *testing.T) {
	dir := t.TempDir()
	root, node := filepath.Join(dir, "root"), filepath.Join(dir, "n2")
	if code, stdout, stderr := cli(t, "ca", "init", "--dir", root, "--trust-domain", "example.org"); code != exitOK || !strings.Contains(stdout, "example.org") {
		t.Fatalf("%d %s %s", code, stdout, stderr)
	}
	if code, _, stderr := cli(t, "ca", "intermediate", "--root", root, "--out", node, "--trust-domain", "example.org"); code != exitOK {
		t.Fatalf("%d %s", code, stderr)
	}
	for path, there := range map[string]bool{
		filepath.Join(root, "root.key"):         true,
		filepath.Join(root, "intermediate.key"): true,
		filepath.Join(node, "root.pem"):         true,
		filepath.Join(node, "intermediate.pem"): true,
		filepath.Join(node, "intermediate.key"): true,
		filepath.Join(node, "root.key"):         false,
	} {
		info, err := os.Stat(path)
		if (err == nil) != there {
			t.Errorf("%s: %v, there should be one: %t", path, err, there)
		}
		if err == nil && strings.HasSuffix(path, ".key") && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", path, info.Mode().Perm())
		}
	}
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
	code, stdout, stderr := cli(t, "cleanup", "--run-dir", dir)
	if code != exitOK || !strings.Contains(stdout, "nothing to clean up in "+dir) {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
}

// build makes the binary, so that main, its exit code and the linker's version
// are in the tests.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "ztunnel")
	cmd := exec.Command("go", "build", "-ldflags", "-X main.version=v9.9.9", "-o", bin, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
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
