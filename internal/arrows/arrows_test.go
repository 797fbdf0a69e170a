// SPDX-License-Identifier: Apache-2.0

package arrows

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const module = "github.com/culvert-mesh/culvert"

// rule is about every package of ours that is below one of Of. Paths of ours
// are written without the module; a path covers what is below it.
type rule struct {
	why string
	of  []string
	// only, where it is not nil, are the packages of ours that they may
	// depend on, themselves aside.
	only []string
	// never are packages of anybody's that they may not depend on, neither
	// directly nor through others.
	never []string
	// neverDirect are packages that they may not import themselves.
	neverDirect []string
}

// Packages that make or use sockets. "net" itself is no longer pure, while
// net/netip and net/url are.
var (
	sockets = []string{"=net", "net/http", "crypto/tls", "golang.org/x/sys", "github.com/vishvananda", "github.com/cilium/ebpf", "tunnel", "redirect", "internal/netns"}
	clients = []string{"k8s.io", "sigs.k8s.io", "google.golang.org/grpc", "github.com/envoyproxy", "istio.io"}
)

var rules = []rule{
	{
		why:   "the tunnel's binary links neither client-go nor gRPC: what talks to a cluster is another program",
		of:    []string{"cmd/ztunnel"},
		never: clients,
	},
	{
		why:  "frames, records and fields are state machines that import none of ours",
		of:   []string{"tunnel/h2", "tunnel/record", "tunnel/hbone"},
		only: []string{},
		// x/net/http2, whose names h2 and hbone use, imports net.
		// crypto/tls gives record the suites' numbers.
		neverDirect: []string{"=net", "net/http", "golang.org/x/sys", "=os", "=time", "=sync"},
	},
	{
		why:         "a session knows no socket, no goroutine and no clock: it can be frozen between any two calls",
		of:          []string{"tunnel/session"},
		only:        []string{"tunnel/h2", "tunnel/record"},
		neverDirect: []string{"=net", "golang.org/x/sys", "=os", "=time", "=sync"},
	},
	{
		why:  "an event loop knows no protocol",
		of:   []string{"tunnel/loop"},
		only: []string{},
	},
	{
		why:  "relays move bytes: they know no policy and no identity",
		of:   []string{"tunnel/relay"},
		only: []string{"tunnel/h2", "tunnel/loop", "tunnel/record", "tunnel/session"},
	},
	{
		why:  "a handshake needs identity, and gives keys",
		of:   []string{"tunnel/handshake"},
		only: []string{"identity", "tunnel/record"},
	},
	{
		why:   "the tunnel decides by the snapshot, and is handed its sockets",
		of:    []string{"tunnel"},
		never: []string{"redirect", "bpf", "internal/netns", "config", "daemon", "pod", "identity/ca", "admin"},
	},
	{
		why:  "redirection gets plain values",
		of:   []string{"redirect"},
		only: []string{"bpf", "internal/netns", "internal/input", "redirect"},
	},
	{
		why:   "what is decided from is values: no socket, no cluster, nothing of how they came",
		of:    []string{"workload", "policy", "service", "snapshot"},
		only:  []string{"workload", "policy", "service", "snapshot", "config/strict"},
		never: slices.Concat(sockets, clients),
	},
	{
		why:  "the parser of files knows none of those whose files it parses",
		of:   []string{"config/strict"},
		only: []string{},
	},
	{
		why:  "configuration is one struct of plain values",
		of:   []string{"config"},
		only: []string{"config/strict", "internal/input"},
	},
	{
		why:  "identity is values and a seam; issuers are below it",
		of:   []string{"identity"},
		only: []string{"identity", "internal/input"},
	},
	{
		why:  "the seam of identity knows no issuer",
		of:   []string{"=identity"},
		only: []string{},
	},
	{
		why:  "the admin socket imports no part",
		of:   []string{"admin"},
		only: []string{},
	},
	{
		why:  "parts hand telemetry their records",
		of:   []string{"telemetry"},
		only: []string{"identity", "policy", "config/strict", "internal/cli"},
	},
	{
		why:   "what a machine lacks is found before anything runs",
		of:    []string{"preflight"},
		never: []string{"tunnel", "daemon", "snapshot", "telemetry", "admin", "redirect/socket"},
	},
	{
		why:  "namespaces, addresses, files and privileges are below everything",
		of:   []string{"internal/netns", "internal/input", "internal/cli", "bpf", "privilege"},
		only: []string{},
	},
	{
		why:   "tests use the whole from outside",
		of:    []string{"test"},
		never: []string{"tunnel", "daemon", "redirect/socket"},
	},
}

// exempt are dependencies that a rule would forbid and that are meant. Key: the
// rule's first package.
var exempt = map[string][]string{
	"tunnel": {"config/strict"}, // through workload and policy, which parse files with it
}

// importers are the only packages that may import these.
var importers = map[string][]string{
	"daemon":    {"cmd/ztunnel"},
	"preflight": {"cmd/ztunnel", "daemon", "test/vm"},
	"cmd":       {},
	"test":      {"test"},
	// Those of the laboratory.
	"internal/lab":     {"test"},
	"internal/testca":  {"test/bench"}, // for the sidecars beside us
	"internal/testns":  {},
	"internal/testtcp": {},
	"internal/peer":    {},
	"internal/capture": {"test"},
}

// pkg is what go list says of a package.
type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Standard   bool
	Error      *struct{ Err string }
}

// ours is the package's path without the module.
func ours(path string) (string, bool) {
	rest, ok := strings.CutPrefix(path, module+"/")
	return rest, ok
}

// covers reports whether pattern covers a path, of ours or of others. One that
// begins with "=" covers itself only.
func covers(pattern, path string) bool {
	if p, ok := ours(path); ok {
		path = p
	}
	if exact, ok := strings.CutPrefix(pattern, "="); ok {
		return path == exact
	}
	return path == pattern || strings.HasPrefix(path, pattern+"/")
}

func coversAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return covers(p, path) })
}

// broken lists the arrows of pkgs that the rules forbid.
func broken(pkgs []pkg) []string {
	var found []string
	say := func(p pkg, dep, why string) {
		found = append(found, fmt.Sprintf("%s -> %s: %s", p.ImportPath, dep, why))
	}
	for _, p := range pkgs {
		if _, ok := ours(p.ImportPath); !ok {
			continue
		}
		for _, r := range rules {
			if !coversAny(r.of, p.ImportPath) {
				continue
			}
			for _, d := range p.Deps {
				_, isOurs := ours(d)
				switch {
				case coversAny(exempt[r.of[0]], d):
				case isOurs && r.only != nil && !coversAny(r.only, d), coversAny(r.never, d) && !coversAny(r.of, d):
					say(p, d, r.why)
				}
			}
			for _, d := range p.Imports {
				if coversAny(r.neverDirect, d) {
					say(p, d, r.why)
				}
			}
		}
		for _, d := range p.Imports {
			for what, who := range importers {
				if covers(what, d) && !coversAny(who, p.ImportPath) {
					say(p, d, fmt.Sprintf("only %v may import it", who))
				}
			}
		}
	}
	return found
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-deps", "-json=ImportPath,Imports,Deps,Standard,Error", module+"/...")
	cmd.Dir = root(t)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return pkgs
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := ours(p.ImportPath); ok && p.Error != nil {
			t.Errorf("%s: %s", p.ImportPath, p.Error.Err)
		}
		pkgs = append(pkgs, p)
	}
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "go.mod")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// sources calls f for each Go file of the module. (Reading them is also what
// tells go test that its cached result is stale.)
func sources(t *testing.T, f func(path string, src []byte)) {
	t.Helper()
	dir := root(t)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != dir && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "out" || d.Name() == "bin"):
			return fs.SkipDir
		case d.IsDir() || filepath.Ext(path) != ".go":
			return nil
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		f(filepath.ToSlash(rel), src)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestArrows(t *testing.T) {
	sources(t, func(string, []byte) {})
	pkgs := list(t)
	seen := 0
	for _, p := range pkgs {
		if _, ok := ours(p.ImportPath); ok {
			seen++
		}
	}
	if seen < 20 {
		t.Fatalf("go list found %d packages of ours", seen)
	}
	for _, b := range broken(pkgs) {
		t.Error(b)
	}
}

// Every path that a rule names is there, but for those that the layout only
// foresees: a package that was renamed must not slip out of its rule.
func TestRulesNamePackagesThatExist(t *testing.T) {
	foreseen := []string{"service"}
	dir := root(t)
	check := func(paths []string) {
		for _, p := range paths {
			p = strings.TrimPrefix(p, "=")
			first, _, _ := strings.Cut(p, "/")
			if strings.Contains(first, ".") || slices.Contains(foreseen, p) || p == "net" || p == "net/http" || p == "crypto/tls" || p == "os" || p == "time" || p == "sync" {
				continue
			}
			if fi, err := os.Stat(filepath.Join(dir, p)); err != nil || !fi.IsDir() {
				t.Errorf("a rule names %s, which is not a folder", p)
			}
		}
	}
	for _, r := range rules {
		check(r.of)
		check(r.only)
		check(r.never)
	}
	for what, who := range importers {
		check([]string{what})
		check(who)
	}
}

// The control: each kind of arrow that is forbidden is seen when it is there.
func TestForbiddenArrowsAreSeen(t *testing.T) {
	of := func(path string, imports ...string) pkg {
		for i, p := range imports {
			if first, _, _ := strings.Cut(p, "/"); !strings.Contains(first, ".") && !slices.Contains([]string{"net", "time", "sync"}, first) {
				imports[i] = module + "/" + p
			}
		}
		return pkg{ImportPath: module + "/" + path, Imports: imports, Deps: imports}
	}
	for _, tt := range []struct {
		p    pkg
		want int
	}{
		{of("cmd/ztunnel", "daemon", "config"), 0},
		{of("cmd/ztunnel", "k8s.io/client-go/kubernetes"), 1},
		{of("cmd/ztunnel", "google.golang.org/grpc"), 1},
		{of("tunnel/h2", "tunnel/record"), 1},
		{of("tunnel/record", "identity"), 1},
		{of("tunnel/hbone", "telemetry"), 1},
		{of("tunnel/h2", "net"), 1},
		{of("tunnel/session", "time"), 1},
		{of("tunnel/session", "tunnel/relay"), 1},
		{of("tunnel/relay", "identity"), 1},
		{of("tunnel", "snapshot", "identity", "tunnel/relay", "config/strict"), 0},
		{of("tunnel", "redirect"), 1},
		{of("tunnel", "redirect/socket"), 1},
		{of("tunnel/relay", "redirect"), 2}, // the tunnel's rule, and the relay's
		{of("redirect", "snapshot"), 1},
		{of("redirect/socket", "internal/netns"), 0},
		{of("redirect", "workload"), 1},
		{of("workload", "net/netip"), 0},
		{of("workload", "net"), 1},
		{of("policy", "tunnel/hbone"), 1},
		{of("snapshot", "google.golang.org/grpc/codes"), 1},
		{of("snapshot", "k8s.io/api/core/v1"), 1},
		{of("snapshot", "golang.org/x/sys/unix"), 1},
		{of("snapshot", "identity"), 1},
		{of("identity", "identity/ca"), 1},
		{of("pod/static", "daemon"), 1},
		{of("preflight", "redirect", "pod/static", "config"), 0},
		{of("preflight", "tunnel"), 1},
		{of("redirect", "preflight"), 2}, // redirect's own, and who may import it
		{of("daemon", "internal/lab"), 1},
		{of("redirect", "test/demo"), 2},
	} {
		if got := broken([]pkg{tt.p}); len(got) != tt.want {
			t.Errorf("%s importing %v: %d arrows found broken, want %d: %v", tt.p.ImportPath, tt.p.Imports, len(got), tt.want, got)
		}
	}
	// Through others too.
	p := of("snapshot", "workload")
	p.Deps = append(p.Deps, "net")
	if got := broken([]pkg{p}); len(got) != 1 {
		t.Errorf("a socket package behind another was not seen: %v", got)
	}
}

// enters are the ways into another network namespace.
func enters(src []byte) ([]string, error) {
	file, err := parser.ParseFile(token.NewFileSet(), "", src, 0)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, imp := range file.Imports {
		if strings.Trim(imp.Path.Value, `"`) == "github.com/vishvananda/netns" {
			found = append(found, "import of vishvananda/netns")
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			switch s.Sel.Name {
			case "Setns", "SYS_SETNS", "NewHandleAt", "NewHandleAtFrom", "GetNetlinkSocketAt":
				found = append(found, s.Sel.Name)
			}
		}
		return true
	})
	return found, nil
}

// A thread that has entered a namespace and cannot come back must die with it.
// One package knows how, and no other may enter any.
func TestOnlyNetnsEntersNamespaces(t *testing.T) {
	const home = "internal/netns/"
	inHome := 0
	sources(t, func(path string, src []byte) {
		found, err := enters(src)
		switch {
		case err != nil:
			t.Errorf("%s: %v", path, err)
		case strings.HasPrefix(path, home):
			inHome += len(found)
		case strings.HasPrefix(path, "internal/arrows/"):
		case strings.HasPrefix(path, "privilege/"): // names the call, to say who may make it
		case path == "preflight/preflight_test.go": // which has it forbidden
		case len(found) > 0:
			t.Errorf("%s enters a network namespace (%s): use internal/netns", path, strings.Join(found, ", "))
		}
	})
	if inHome == 0 {
		t.Error("internal/netns itself calls no setns: what is looked for is wrong")
	}
}

func TestEntersIsSeen(t *testing.T) {
	for src, want := range map[string][]string{
		"package p\nfunc f() { unix.Setns(1, 2) }":                         {"Setns"},
		"package p\nfunc f() { syscall.RawSyscall(unix.SYS_SETNS) }":       {"SYS_SETNS"},
		"package p\nfunc f() { netlink.NewHandleAt(ns) }":                  {"NewHandleAt"},
		"package p\nimport \"github.com/vishvananda/netns\"":               {"import of vishvananda/netns"},
		"package p\n// Setns in a comment\nfunc f() { netns.Open(\"x\") }": nil,
	} {
		got, err := enters([]byte(src))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", src, d)
		}
	}
}
