// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"strings"
	"testing"
	"text/template"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/culvert-mesh/culvert/admin"
)

func TestMain(m *testing.M) {
	testscript.Main(tests{m}, map[string]func(){"ztunnel": main})
}

// tests are run with a folder for what they share, which goes with them.
type tests struct{ *testing.M }

// Run is testscript.TestingM's.
func (m tests) Run() int {
	defer func() {
		if builtIn != "" {
			os.RemoveAll(builtIn)
		}
	}()
	return m.M.Run()
}

// TestScripts runs the command line as testdata/*.txtar say. Beside testscript's own
// commands they have serve, an admin socket with answers from files.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: os.Getenv("CULVERT_UPDATE") != "",
		Cmds:          map[string]func(*testscript.TestScript, bool, []string){"serve": serve},
	})
}

// serve answers on an admin socket: serve DIR METHOD:PATH=FILE… A file is a template
// that has ago and in, for times before and after now.
func serve(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: serve DIR METHOD:PATH=FILE…")
	}
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	moment := func(sign time.Duration) func(string) (string, error) {
		return func(text string) (string, error) {
			d, err := time.ParseDuration(text)
			return time.Now().Add(sign * d).Format(time.RFC3339Nano), err
		}
	}
	var mounts []admin.Mount
	for _, arg := range args[1:] {
		where, file, ok := strings.Cut(arg, "=")
		method, path, okay := strings.Cut(where, ":")
		if !ok || !okay {
			ts.Fatalf("serve: %q is not METHOD:PATH=FILE", arg)
		}
		t, err := template.New(file).Funcs(template.FuncMap{"ago": moment(-1), "in": moment(1)}).Parse(ts.ReadFile(file))
		ts.Check(err)
		mounts = append(mounts, admin.Mount{Pattern: method + " " + path, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			var b bytes.Buffer
			if err := t.Execute(&b, nil); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			if text, broken := strings.CutPrefix(b.String(), "500 "); broken {
				http.Error(w, strings.TrimSpace(text), http.StatusInternalServerError)
				return
			}
			_, _ = w.Write(b.Bytes())
		})})
	}
	s, err := admin.Listen(context.Background(), admin.Socket(dir), mounts...)
	ts.Check(err)
	ts.Defer(func() { ts.Check(s.Close()) })
}
