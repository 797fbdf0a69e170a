// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.yaml.in/yaml/v4"
)

// TrustDomain is the trust domain of all labs.
const TrustDomain = "cluster.local"

// metricsAddress is where each daemon serves metrics and readiness, in its node's namespace.
const metricsAddress = "127.0.0.1:15020"

// Workload is an entry of the daemons' workload file.
type Workload struct {
	Name           string       `yaml:"name"`
	Namespace      string       `yaml:"namespace"`
	ServiceAccount string       `yaml:"serviceAccount"`
	Node           string       `yaml:"node,omitempty"`
	Addresses      []netip.Addr `yaml:"addresses"`
	Protocol       string       `yaml:"protocol"` // hbone or tcp
}

// Workload returns the pod's entry, as hbone.
func (p *Pod) Workload() Workload {
	return Workload{
		Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount,
		Node: p.Node.Name, Addresses: p.Addrs(), Protocol: "hbone",
	}
}

// Workloads returns the entries of all pods.
func (l *Lab) Workloads() []Workload {
	var out []Workload
	for _, p := range l.Pods() {
		out = append(out, p.Workload())
	}
	return out
}

// DaemonConfig says which daemon to start and what it is told.
type DaemonConfig struct {
	// Binary is the path of ztunnel.
	Binary string
	// Workloads is what the daemon knows of the mesh. Nil: all pods of the lab.
	Workloads []Workload
	// Pods are those that the daemon enrols. Nil: all of the node.
	Pods []*Pod
	// Sidecar has the daemon run in the namespace of its only pod, with files of its own, and not in the node's.
	Sidecar bool
	// Settings are keys of the configuration file that replace the lab's own, for example
	// {"mesh": map[string]any{"cidrs": []string{}}}.
	Settings map[string]any
}

// Daemon is a running ztunnel of a node.
type Daemon struct {
	*Process
	Node *Node
	// ConfigFile is what the daemon was started with; AccessLogFile is its standard output, LogFile its standard error.
	ConfigFile, AccessLogFile, LogFile string

	binary, runDir string
	client         *http.Client
}

// RunDir is the run directory of the node's daemon, unless DaemonConfig's Settings name another.
func (n *Node) RunDir() string { return runDir(n.Dir) }

func runDir(dir string) string { return filepath.Join(dir, "run") }

// RunDir is the daemon's run directory, unless DaemonConfig's Settings name another.
func (d *Daemon) RunDir() string { return d.runDir }

// dir is where the daemon's files are.
func (n *Node) dir(cfg DaemonConfig) string {
	if cfg.Sidecar {
		return filepath.Join(n.Dir, cfg.Pods[0].Name)
	}
	return n.Dir
}

// StartDaemon writes the node's configuration, starts the binary and waits until it is ready. The lab stops it.
func (n *Node) StartDaemon(ctx context.Context, cfg DaemonConfig) (*Daemon, error) {
	d, err := n.LaunchDaemon(cfg)
	if err != nil {
		return nil, err
	}
	if err := d.Ready(ctx); err != nil {
		d.Kill()
		return nil, fmt.Errorf("%w\n%s", err, d.LogTail(20))
	}
	return d, nil
}

// LaunchDaemon is StartDaemon without the wait.
func (n *Node) LaunchDaemon(cfg DaemonConfig) (*Daemon, error) {
	dir, start, do := n.dir(cfg), n.Start, n.Do
	if cfg.Sidecar {
		start, do = cfg.Pods[0].Start, cfg.Pods[0].Do
	}
	d := &Daemon{
		Node:          n,
		ConfigFile:    filepath.Join(dir, "config.yaml"),
		AccessLogFile: filepath.Join(dir, "access.log"),
		LogFile:       filepath.Join(dir, "ztunnel.log"),
		runDir:        runDir(dir),
		client:        httpClient(do),
	}
	var err error
	if d.binary, err = filepath.Abs(cfg.Binary); err != nil {
		return nil, fmt.Errorf("start daemon on %s: %w", n.Name, err)
	}
	if err := n.Configure(cfg); err != nil {
		return nil, fmt.Errorf("start daemon on %s: %w", n.Name, err)
	}
	if err := n.lab.journal.add("cleanup", d.binary, "cleanup", "--config", d.ConfigFile); err != nil {
		return nil, fmt.Errorf("start daemon on %s: %w", n.Name, err)
	}
	cmd := exec.Command(d.binary, "run", "--config", d.ConfigFile)
	for path, to := range map[string]*io.Writer{d.AccessLogFile: &cmd.Stdout, d.LogFile: &cmd.Stderr} {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, fmt.Errorf("start daemon on %s: %w", n.Name, err)
		}
		defer f.Close() // the child has its own
		*to = f
	}
	if d.Process, err = start(cmd); err != nil {
		return nil, fmt.Errorf("start daemon on %s: %w", n.Name, err)
	}
	n.daemons = append(n.daemons, d)
	return d, nil
}

// Configure writes the files of the node's daemon, as StartDaemon does; a running daemon reads some of them again at
// SIGHUP.
func (n *Node) Configure(cfg DaemonConfig) error {
	if cfg.Workloads == nil {
		cfg.Workloads = n.lab.Workloads()
	}
	if cfg.Pods == nil {
		cfg.Pods = n.Pods
	}
	dir := n.dir(cfg)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	caDir := filepath.Join(dir, "ca")
	if err := n.lab.giveAuthority(caDir); err != nil {
		return err
	}
	settings := map[string]any{
		"node":        map[string]any{"name": n.Name},
		"runDir":      runDir(dir),
		"trustDomain": TrustDomain,
		"identity":    map[string]any{"ca": map[string]any{"dir": caDir}},
		"workloads":   map[string]any{"file": "workloads.yaml"},
		"pods":        map[string]any{"file": "pods.yaml"},
		"mesh":        map[string]any{"cidrs": PodCIDRs()},
		"metrics":     map[string]any{"address": metricsAddress},
		"accessLog":   map[string]any{"format": "json"},
		"log":         map[string]any{"format": "text", "level": "info"},
	}
	if n.lab.cgroup != "" {
		settings["cgroup"] = n.lab.cgroup
	}
	maps.Copy(settings, cfg.Settings)

	pods := []map[string]any{}
	for _, p := range cfg.Pods {
		pods = append(pods, map[string]any{
			"name": p.Name, "namespace": p.Namespace, "serviceAccount": p.ServiceAccount,
			"netns": p.NetnsPath(), "addresses": p.Addrs(),
		})
	}
	for name, content := range map[string]any{
		"config.yaml":    settings,
		"workloads.yaml": map[string]any{"workloads": cfg.Workloads},
		"pods.yaml":      map[string]any{"pods": pods},
	} {
		if err := writeYAML(filepath.Join(dir, name), content); err != nil {
			return err
		}
	}
	return nil
}

func writeYAML(path string, content any) error {
	b, err := yaml.Dump(content)
	if err != nil {
		return fmt.Errorf("encode %s: %w", filepath.Base(path), err)
	}
	return os.WriteFile(path, b, 0o600)
}

// Ready waits until the daemon says that it is ready, or has ended.
func (d *Daemon) Ready(ctx context.Context) error {
	return Until(ctx, "ztunnel of "+d.Node.Name+" is ready", func() error {
		_, err := d.get(ctx, "/healthz/ready")
		return err
	}, d.Ended)
}

func (d *Daemon) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metricsAddress+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, resp.Status, bytes.TrimSpace(body))
	}
	return body, err
}

// Metrics scrapes the daemon.
func (d *Daemon) Metrics(ctx context.Context) (Metrics, error) {
	body, err := d.get(ctx, "/metrics")
	if err != nil {
		return nil, fmt.Errorf("scrape %s: %w", d.Node.Name, err)
	}
	return parseMetrics(bytes.NewReader(body))
}

// Entry is a line of the access log.
type Entry map[string]any

// String returns a field as text; empty: there is none. A dot goes into an object.
func (e Entry) String(field string) string {
	var v any
	if direct, ok := e[field]; ok {
		v = direct
	} else if outer, inner, ok := strings.Cut(field, "."); ok {
		if object, ok := e[outer].(map[string]any); ok {
			return Entry(object).String(inner)
		}
	}
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	case json.Number:
		return v.String()
	default:
		return fmt.Sprint(v)
	}
}

// AccessLog returns the lines that the daemon, and its predecessors on the node, have written so far.
func (d *Daemon) AccessLog() ([]Entry, error) {
	b, err := os.ReadFile(d.AccessLogFile)
	if err != nil {
		return nil, fmt.Errorf("read access log: %w", err)
	}
	var out []Entry
	for {
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		if !whole { // the last one is still being written
			return out, nil
		}
		b = rest
		decoder := json.NewDecoder(bytes.NewReader(line))
		decoder.UseNumber()
		e := Entry{}
		if err := decoder.Decode(&e); err != nil {
			return nil, fmt.Errorf("read access log of %s: %q: %w", d.Node.Name, line, err)
		}
		out = append(out, e)
	}
}

// WaitAccessLog waits for n lines that match, and returns all that do; nil matches each line.
func (d *Daemon) WaitAccessLog(ctx context.Context, n int, match func(Entry) bool) ([]Entry, error) {
	var found []Entry
	err := Until(ctx, fmt.Sprintf("the access log of %s has %d lines", d.Node.Name, n), func() error {
		all, err := d.AccessLog()
		if err != nil {
			return err
		}
		found = found[:0]
		for _, e := range all {
			if match == nil || match(e) {
				found = append(found, e)
			}
		}
		if len(found) < n {
			return fmt.Errorf("has %d that match, %d in all", len(found), len(all))
		}
		return nil
	}, d.Ended)
	return found, err
}

// LogTail returns the last lines of the daemon's own log.
func (d *Daemon) LogTail(lines int) string { return Tail(d.LogFile, lines) }

// Tail returns the last lines of a file, or why it cannot be read.
func Tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Tails returns the last lines of the files in the nodes' directories whose names match.
func (l *Lab) Tails(lines int, patterns ...string) string {
	var b strings.Builder
	for _, pattern := range patterns {
		found, _ := filepath.Glob(filepath.Join(l.Dir, "*", pattern))
		for _, path := range found {
			fmt.Fprintf(&b, "%s:\n%s\n", path, Tail(path, lines))
		}
	}
	return b.String()
}

// Stop ends the daemon as a service manager does, and returns how it ended.
func (d *Daemon) Stop(ctx context.Context) error {
	if err := d.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return d.Wait(ctx)
}

// Cleanup runs "ztunnel cleanup" for the node and returns what it says.
func (d *Daemon) Cleanup(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, d.binary, "cleanup", "--config", d.ConfigFile).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("clean up %s: %w: %s", d.Node.Name, err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// Close stops the daemon, by force when it takes too long. What it has in the kernel stays until the lab is closed.
func (d *Daemon) Close() error {
	const patience = 10 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := d.Stop(ctx); ctx.Err() != nil {
		d.Kill()
		return errors.Join(err, fmt.Errorf("killed it:\n%s", d.LogTail(20)))
	}
	return nil
}
