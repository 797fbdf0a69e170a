// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// secrets are forms in which a key file could be in a report: its lines, what they
// encode, and the number that is the key.
func secrets(t *testing.T, path string) (out [][]byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(data) {
		out = append(out, bytes.TrimSpace(line))
	}
	block, _ := pem.Decode(data)
	if block == nil {
		t.Fatalf("%s is no PEM", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	number, err := parsed.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return append(out, block.Bytes, number, []byte(hex.EncodeToString(number)), []byte(base64.StdEncoding.EncodeToString(number)), []byte(base64.StdEncoding.EncodeToString(block.Bytes)))
}

// leaked says which of these are in a file of a report.
func leaked(content []byte, secrets [][]byte) bool {
	for _, s := range append(secrets, []byte("PRIVATE KEY")) {
		if bytes.Contains(content, s) {
			return true
		}
	}
	return false
}

// A report of a bug has what is needed and no key, nor a byte of a connection.
func TestBugreportHasNoSecrets(t *testing.T) {
	userSpace(t)
	e, d := mesh(t)
	app, err := e.Pod(2, 1).Echo(8080)
	e.must(err)
	_ = e.try(e.Pod(1, 1), unowned(4))
	c := e.connect(e.Pod(1, 1), app.Addr(4))
	e.must(exchange(c, marker))
	e.command(d[0], "log-level", "debug")
	e.must(e.call(e.Pod(1, 2), app.Addr(4)))
	e.until("the refusal is told", func() error {
		if told := e.command(d[0], "connections", "--refused"); !strings.Contains(told, "unknown_destination") {
			return errors.New(told)
		}
		return nil
	})

	keys, err := filepath.Glob(filepath.Join(e.Nodes[0].Dir, "ca", "*.key"))
	e.must(err)
	if len(keys) == 0 {
		t.Fatal("the authority has no key")
	}
	var hidden [][]byte
	for _, k := range keys {
		hidden = append(hidden, secrets(t, k)...)
	}
	hidden = append(hidden, []byte(marker))

	report := filepath.Join(t.TempDir(), "report.tar.gz")
	e.command(d[0], "bugreport", "--out", report)
	info, err := os.Stat(report)
	e.must(err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("its mode is %v", info.Mode())
	}
	f, err := os.Open(report)
	e.must(err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	e.must(err)
	has := map[string]string{ // of each file, what is to be in it
		"version.txt": "Culvert ztunnel", "status.json": key(e.Pod(1, 1)), "connections.json": app.Addr(4).String(),
		"refused.json": "unknown_destination", "plaintext.json": "connections", "workloads.json": e.Pod(2, 1).Name,
		"certs.json": e.Pod(1, 1).Identity(), "metrics.txt": "culvert_pods", "log.txt": "log level changed",
		"goroutines.txt": "goroutine profile", "config.yaml": e.Nodes[0].RunDir(), "kernel.txt": "kernel: ", "cgroup.txt": "/limits",
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		e.must(err)
		content, err := io.ReadAll(r)
		e.must(err)
		if leaked(content, hidden) {
			t.Errorf("%s has a secret", h.Name)
		}
		name := filepath.Base(h.Name)
		if want, ok := has[name]; !ok || !bytes.Contains(content, []byte(want)) {
			t.Errorf("%s is not expected, or lacks %q:\n%.2000s", h.Name, want, content)
		}
		delete(has, name)
		// The control: with any of them in it, the oracle rings.
		for _, s := range hidden {
			if !leaked(append(content[:len(content)/2:len(content)/2], append(s, content[len(content)/2:]...)...), hidden) {
				t.Errorf("%q in %s is not noticed", s, h.Name)
			}
		}
	}
	for name := range has {
		t.Errorf("there is no %s", name)
	}
}

// A cleanup that does not see the pins, as under ip netns exec, removes nothing and
// says so.
func TestCleanupOutOfSight(t *testing.T) {
	e, d := mesh(t)
	d[0].Kill()
	pinned := func() (all []string) {
		e.must(filepath.WalkDir(e.pins(d[0]), func(path string, _ fs.DirEntry, err error) error {
			all = append(all, path)
			return err
		}))
		return all
	}
	before := pinned()
	cmd := exec.Command("unshare", "--mount", "sh", "-c", "mount -t tmpfs none /sys && exec "+ztunnel+" cleanup --config "+d[0].ConfigFile)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	p, err := e.Nodes[0].Start(cmd)
	e.must(err)
	if err := p.Wait(e.ctx); err == nil || !strings.Contains(out.String(), "nsenter --target 1") {
		t.Errorf("%v: %s", err, &out)
	}
	if diff := cmp.Diff(before, pinned()); diff != "" || len(before) < 10 {
		t.Errorf("what is pinned has changed: %s", diff)
	}
	if said, err := d[0].Cleanup(e.ctx); err != nil || !strings.Contains(said, "hook connect4 detached") {
		t.Errorf("control: where it sees them: %v\n%s", err, said)
	}
}
