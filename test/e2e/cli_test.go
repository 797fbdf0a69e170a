// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/culvert-mesh/culvert/internal/cli"
	"github.com/culvert-mesh/culvert/internal/lab"
)

// cliPage shows each command of ztunnel, with what it prints.
const cliPage = "../../docs/cli.md"

// prompt begins a command of the page: the node, and what is typed there.
var prompt = regexp.MustCompile(`^(node\d)# (.*)$`)

// TestCommandLinePage runs the commands of docs/cli.md, in their order, at two nodes
// where some things are well and some are not, and holds what is printed to the page.
// With -rewrite it writes it there.
func TestCommandLinePage(t *testing.T) {
	userSpace(t)
	page, err := os.ReadFile(cliPage)
	if err != nil {
		t.Fatal(err)
	}
	w := newCLIWorld(t)
	var out strings.Builder
	lines := strings.SplitAfter(string(page), "\n")
	for i := 0; i < len(lines); {
		line := lines[i]
		out.WriteString(line)
		i++
		if strings.TrimSpace(line) != "```console" {
			continue
		}
		for i < len(lines) && lines[i] != "```\n" {
			if m := prompt.FindStringSubmatch(strings.TrimSuffix(lines[i], "\n")); m != nil {
				out.WriteString(lines[i])
				out.WriteString(w.run(m[1], m[2]))
			}
			i++
		}
	}
	if *rewrite {
		w.must(os.WriteFile(cliPage, []byte(out.String()), 0o644))
		return
	}
	if diff := cmp.Diff(string(page), out.String()); diff != "" {
		t.Errorf("docs/cli.md is not what is printed (-rewrite writes it anew), -page +printed:\n%s", diff)
	}
	names, err := exec.Command(ztunnel, "__complete", "").Output()
	w.must(err)
	for line := range strings.Lines(string(names)) {
		name, about, ok := strings.Cut(line, "\t")
		if ok && name != "help" && !strings.Contains(string(page), "\n## "+name+"\n") {
			t.Errorf("docs/cli.md does not have %s: %s", name, about)
		}
	}
}

// cliWorld is where the page's commands are run.
type cliWorld struct {
	*env
	d     []*lab.Daemon
	dir   string            // where they are run
	names map[string]string // what is another in each run, and what stands for it
	ports map[string]string // likewise
}

func newCLIWorld(t *testing.T) *cliWorld {
	w := &cliWorld{env: setup(t), dir: t.TempDir(), names: map[string]string{}, ports: map[string]string{}}
	for i, name := range []string{"shop", "batch", "stranger", "web", "mail", "other"} {
		p := w.Pod(1+i/3, 1+i%3)
		p.Name, p.ServiceAccount = name, name
		w.names[p.NetnsPath()] = "/run/netns/" + name
	}
	shop, batch, stranger, web := w.Pod(1, 1), w.Pod(1, 2), w.Pod(1, 3), w.Pod(2, 1)
	for _, port := range []uint16{8080, 9090} {
		_, err := web.Echo(port)
		w.must(err)
	}
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(web.V4, port) }

	// One from before the enrolment; a rule; a pod whose namespace is not there.
	old := w.connect(shop, at(9090))
	w.must(exchange(old, marker))
	for _, n := range w.Nodes {
		w.replace(n, "policy.yaml", "rules:\n- {name: no-batch, denySource: ["+batch.Identity()+"]}\n")
	}
	w.d = w.start(lab.DaemonConfig{Settings: map[string]any{"policy": map[string]any{"file": "policy.yaml"}}})
	gone := entryOf(w.Pod(1, 1))
	gone.Name, gone.ServiceAccount, gone.Netns = "late", "late", "/run/netns/late"
	gone.Addresses = []netip.Addr{netip.MustParseAddr("10.77.1.20")}
	w.reloads(w.d[0], "pods", "ok", func() {
		w.replace(w.Nodes[0], "pods.yaml", w.text("pods", []podEntry{entryOf(shop), entryOf(batch), gone}))
	})
	w.reloads(w.d[0], "workloads", "error", func() { w.replace(w.Nodes[0], "workloads.yaml", "workloads:\n- {nam: web}\n") })

	// One that lives, and some that were refused.
	c := w.connect(shop, at(8080))
	w.must(exchange(c, "twelve bytes"))
	told := func(node int, total int) {
		w.until("the refusals are told", func() error {
			if told := w.command(w.d[node-1], "connections", "--refused", "-o", "json"); !strings.Contains(told, fmt.Sprintf(`"total": %d,`, total)) {
				return errors.New(told)
			}
			return nil
		})
	}
	_ = w.try(shop, netip.MustParseAddrPort("10.77.2.99:8080"))
	told(1, 1) // so that it is the earlier one
	for range 2 {
		_ = w.try(batch, at(8080))
	}
	told(2, 2)
	_ = w.try(stranger, at(8080))
	told(1, 3)
	told(2, 3)

	for i, n := range w.Nodes {
		w.names[n.Dir] = "/etc/culvert"
		w.names[n.RunDir()] = "/run/culvert"
		w.names[fmt.Sprintf("process %d,", w.d[i].PID())] = "process 4711,"
		w.names[fmt.Sprintf("process %d:", w.d[i].PID())] = "process 4711:"
		// What is typed names no configuration: it is where it is looked for.
		script := fmt.Sprintf("#!/bin/sh\ncase $1 in ca|version|completion) exec %s \"$@\";; esac\nexec %s \"$@\" --config %s\n", ztunnel, ztunnel, w.d[i].ConfigFile)
		w.must(os.MkdirAll(filepath.Join(w.dir, n.Name), 0o700))
		w.must(os.WriteFile(filepath.Join(w.dir, n.Name, "ztunnel"), []byte(script), 0o700))
	}
	w.names[w.ID] = "lab"
	return w
}

// run is what a command at a node prints, without what is another in each run.
func (w *cliWorld) run(node, typed string) string {
	w.t.Helper()
	if typed == "systemctl stop culvert" {
		w.must(w.d[int(node[4]-'1')].Stop(w.ctx))
		return ""
	}
	cmd := exec.CommandContext(w.ctx, "bash", "-c", typed)
	cmd.Dir = filepath.Join(w.dir, "files")
	w.must(os.MkdirAll(cmd.Dir, 0o700))
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(w.dir, node)+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatalf("%s: %v", typed, err)
	}
	return w.stable(string(out))
}

// changing is what is another at each run, in the order in which it is replaced.
var changing = []struct {
	what *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`ends in \d+h\d+m`), "ends in 23h59m"},
	{regexp.MustCompile(`ends in 364d\d+h`), "ends in 364d23h"},
	{regexp.MustCompile(`ends in 3649d\d+h`), "ends in 3649d23h"},
	{regexp.MustCompile(`\b(\d+m)?\d+s( ago)?($|  )`), "3s$2$3"},
	{regexp.MustCompile(`, up (\d+m)?\d+s`), ", up 3s"},
	{regexp.MustCompile(`^(ztunnel +)\S+(, process)`), "${1}v1.2.3$2"},
	{regexp.MustCompile(`^Culvert ztunnel .*`), "Culvert ztunnel v1.2.3 (go1.26, linux/amd64)"},
	{regexp.MustCompile(`^(cgroup +)/.*`), "$1/"},
	{regexp.MustCompile(`process "[^"]*" of user`), `process "curl" of user`},
	{regexp.MustCompile(`\b[0-9a-f]{29,33}\b`), "3f2a9c01b7d4e6583f2a9c01b7d4e658"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z`), "2026-11-24T21:15:14.699857Z"},
	{regexp.MustCompile(`\d{8}-\d{6}`), "20261124-211514"},
	{regexp.MustCompile(`^(snapshot +)\d+`), "${1}3"},
}

var (
	clientPort = regexp.MustCompile(`:(\d{5})\b`)
	gap        = regexp.MustCompile(` {2,}`)
	branch     = regexp.MustCompile(`^(?:  |│ )*[├└] `)
)

// stable replaces it, and aligns the columns anew.
func (w *cliWorld) stable(text string) string {
	var out strings.Builder
	var block []string
	flush := func() {
		out.WriteString(aligned(block))
		block = nil
	}
	long := slices.SortedFunc(maps.Keys(w.names), func(a, b string) int { return len(b) - len(a) })
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		for _, name := range long {
			line = strings.ReplaceAll(line, name, w.names[name])
		}
		if strings.HasPrefix(line, "memory limit ") {
			continue // the machine's
		}
		line = clientPort.ReplaceAllStringFunc(line, func(port string) string {
			if port == ":15008" || port == ":15020" {
				return port
			}
			if w.ports[port] == "" {
				w.ports[port] = fmt.Sprintf(":%d", 40001+len(w.ports))
			}
			return w.ports[port]
		})
		for _, c := range changing {
			line = c.what.ReplaceAllString(line, c.with)
		}
		if line == "" {
			flush()
			out.WriteString("\n")
			continue
		}
		block = append(block, line)
	}
	flush()
	return out.String()
}

// aligned is a table whose cells have other widths by now. What is no table has no
// gaps of two blanks, or begins with a blank.
func aligned(block []string) string {
	if len(block) == 0 {
		return ""
	}
	if !gap.MatchString(strings.TrimLeft(block[0], " ")) || strings.HasPrefix(block[0], " ") {
		return strings.Join(block, "\n") + "\n"
	}
	t := cli.NewTable()
	for i, cell := range gap.Split(block[0], -1) {
		if slices.Contains([]string{"AGE", "RECEIVED", "SENT", "TIMES"}, cell) {
			t.AlignRight(i)
		}
	}
	for _, line := range block {
		lead := branch.FindString(line)
		cells := gap.Split(strings.TrimPrefix(line, lead), -1)
		cells[0] = lead + cells[0]
		row := make([]any, len(cells))
		for i, cell := range cells {
			row[i] = cell
		}
		t.Row(row...)
	}
	var b strings.Builder
	t.WriteTo(&b)
	return b.String()
}
