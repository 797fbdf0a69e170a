// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/culvert-mesh/culvert/admin"
	"github.com/culvert-mesh/culvert/daemon"
)

// answering serves fixed answers on an admin socket, and returns its run folder.
func answering(t *testing.T, answers map[string]any) string {
	t.Helper()
	dir := t.TempDir()
	var mounts []admin.Mount
	for path, answer := range answers {
		mounts = append(mounts, admin.Mount{Pattern: "GET " + path, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if status, ok := answer.(int); ok {
				http.Error(w, "out of order", status)
				return
			}
			if err := json.NewEncoder(w).Encode(answer); err != nil {
				t.Error(err)
			}
		})})
	}
	s, err := admin.Listen(t.Context(), filepath.Join(dir, "admin.sock"), mounts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func ago(d time.Duration) time.Time { return time.Now().Add(-d) }

func TestStatus(t *testing.T) {
	end := time.Now().Add(26*time.Hour + 30*time.Minute)
	dir := answering(t, map[string]any{"/status": daemon.Status{
		PID: 4711, Version: "v9.9.9", Node: "n1", Started: ago(26*time.Hour + 30*time.Minute), Ready: true,
		RunDir: "/run/culvert", Config: "/etc/culvert/config.yaml", Cgroup: "/kubepods", MemoryLimit: 230 << 20, Snapshot: 7, Modes: []string{"the mesh: strict (default-mode)"},
		Files: []daemon.FileStatus{
			{File: "pods", Time: ago(62*time.Minute + 30*time.Second)},
			{File: "workloads", Time: ago(2*time.Hour + 30*time.Second), Error: "w.yaml:3:1: broken,\nand how"},
		},
		Pods: []daemon.PodStatus{
			{Pod: "demo/web", Identity: "spiffe://cluster.local/ns/demo/sa/web", State: "ready", Since: ago(25*time.Hour + 30*time.Minute),
				Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}, Expires: &end},
			{Pod: "demo/db", Identity: "spiffe://cluster.local/ns/demo/sa/db", State: "enrolling", Since: ago(3*time.Hour + 30*time.Second), Failures: 2, Reason: "open network namespace: no such file"},
		},
	}})
	code, stdout, stderr := cli(t, "status", "--run-dir", dir)
	if code != exitOK || stderr != "" {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	want := `ztunnel        v9.9.9, process 4711, up 1d2h
state          ready
node           n1
run folder     /run/culvert
configuration  /etc/culvert/config.yaml
cgroup         /kubepods
memory limit   230.0 MiB
snapshot       7
plaintext for  the mesh: strict (default-mode)

FILE       READ AGAIN  STATE
pods       1h2m ago    taken
workloads  2h0m ago    not taken, the last good state stays in force: w.yaml:3:1: broken, and how

POD       STATE      FOR   ADDRESSES         CERTIFICATE   IDENTITY                               WHY
demo/web  ready      1d1h  10.0.0.1,fd00::1  ends in 1d2h  spiffe://cluster.local/ns/demo/sa/web  -
demo/db   enrolling  3h0m  -                 -             spiffe://cluster.local/ns/demo/sa/db   open network namespace: no such file
`
	if diff := cmp.Diff(want, stdout); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if _, stdout, _ := cli(t, "status", "--run-dir", dir, "-o", "json"); !strings.Contains(stdout, `"pid": 4711`) || !json.Valid([]byte(stdout)) {
		t.Errorf("as JSON: %s", stdout)
	}
}

func TestStatusOfADaemonWithoutPods(t *testing.T) {
	dir := answering(t, map[string]any{"/status": daemon.Status{Version: "v1", Started: ago(0)}})
	_, stdout, _ := cli(t, "status", "--run-dir", dir)
	for _, want := range []string{"starting: pods are being enrolled", "Files are as they were read at the start.", "No pods: nothing is carried."} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %q in\n%s", want, stdout)
		}
	}
}

func TestConnections(t *testing.T) {
	a, b := netip.MustParseAddrPort("10.0.0.1:4000"), netip.MustParseAddrPort("[fd00::2]:80")
	uid := uint32(1000)
	since := ago(90*time.Minute + 30*time.Second)
	dir := answering(t, map[string]any{
		"/connections": daemon.Connections{Total: 3, Connections: []daemon.Connection{
			{Direction: "outbound", Source: daemon.Party{Address: a, Workload: "web", Namespace: "demo", Identity: "spiffe://c/web"}, Destination: daemon.Party{Address: b}, Security: "mutual_tls", Age: 3723, Received: 12, Sent: 5 << 20},
			{Direction: "inbound", Source: daemon.Party{Address: b}, Destination: daemon.Party{Address: a}, Security: "unknown", Age: 1.5},
		}},
		"/connections/plaintext": daemon.Plaintext{
			Connections: []daemon.PlaintextConnection{
				{Kind: daemon.KindExisting, Pod: "demo/web", Direction: "outbound", Source: daemon.Party{Address: a}, Destination: daemon.Party{Address: b, Workload: "db", Namespace: "demo"}, UID: &uid},
				{Kind: daemon.KindPermissive, Pod: "demo/web", Direction: "inbound", Source: daemon.Party{Address: b}, Destination: daemon.Party{Address: a}, Start: &since},
			},
			Failed: map[string]string{"demo/x": "its namespace\nis gone"},
		},
	})
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"connections"}, `DIRECTION  SOURCE                  DESTINATION     AGE  RECEIVED     SENT  SECURITY    SOURCE IDENTITY  DESTINATION IDENTITY
outbound   demo/web 10.0.0.1:4000  [fd00::2]:80   1h2m      12 B  5.0 MiB  mutual_tls  spiffe://c/web   -
inbound    [fd00::2]:80            10.0.0.1:4000    1s       0 B      0 B  unknown     -                -
and 1 more
`},
		{[]string{"connections", "--plaintext"}, `KIND        POD       DIRECTION  SOURCE         DESTINATION           AGE    USER
existing    demo/web  outbound   10.0.0.1:4000  demo/db [fd00::2]:80  -      1000
permissive  demo/web  inbound    [fd00::2]:80   10.0.0.1:4000         1h30m  -

Those that are existing are older than their pod's enrolment. They end with the process that has them: restart it, or set existing: reset.
pod demo/x could not be looked at: its namespace is gone
`},
	} {
		code, stdout, stderr := cli(t, append(tt.args, "--run-dir", dir)...)
		if code != exitOK || stderr != "" {
			t.Errorf("%v: exit code %d: %s", tt.args, code, stderr)
		}
		if diff := cmp.Diff(tt.want, stdout); diff != "" {
			t.Errorf("%v: -want +got\n%s", tt.args, diff)
		}
		if _, stdout, _ := cli(t, append(tt.args, "--run-dir", dir, "-o", "json")...); !json.Valid([]byte(stdout)) || !strings.Contains(stdout, a.String()) {
			t.Errorf("%v as JSON: %s", tt.args, stdout)
		}
	}

	none := answering(t, map[string]any{"/connections": daemon.Connections{}, "/connections/plaintext": daemon.Plaintext{}})
	if _, stdout, _ := cli(t, "connections", "--run-dir", none); stdout != "No connections.\n" {
		t.Errorf("none: %s", stdout)
	}
	if _, stdout, _ := cli(t, "connections", "--plaintext", "--run-dir", none); !strings.Contains(stdout, "by configuration") {
		t.Errorf("none: %s", stdout)
	}
}

func TestAskingWhatDoesNotAnswer(t *testing.T) {
	for name, tt := range map[string]struct {
		answers map[string]any
		want    string
	}{
		"an older daemon":    {map[string]any{}, "is of a version that does not know this"},
		"one out of order":   {map[string]any{"/status": http.StatusInternalServerError}, "500 Internal Server Error: out of order"},
		"one of other words": {map[string]any{"/status": "text"}, "understand its answer"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := cli(t, "status", "--run-dir", answering(t, tt.answers))
			if code != exitFailure || !strings.Contains(stderr, tt.want) {
				t.Errorf("exit code %d: %s", code, stderr)
			}
		})
	}
	// A killed daemon leaves its socket.
	dir := t.TempDir()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: filepath.Join(dir, "admin.sock")}); err != nil {
		t.Fatal(err)
	}
	syscall.Close(fd)
	if _, _, stderr := cli(t, "status", "--run-dir", dir); !strings.Contains(stderr, "no ztunnel answers at "+dir) {
		t.Errorf("a killed one: %s", stderr)
	}
	if err := os.Mkdir(filepath.Join(dir, "pods"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "pods", "1.json"), []byte(`{"name":"demo_web"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, stderr := cli(t, "status", "--run-dir", dir); !strings.Contains(stderr, "pods that are enrolled there, 1, are refused") {
		t.Errorf("a killed one with a pod: %s", stderr)
	}
}

// TestAskingUnprivileged needs root, to be somebody else.
func TestAskingUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	bin := build(t)
	// What holds the test's folders is for its user only.
	if err := os.Chmod(filepath.Dir(filepath.Dir(bin)), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "status", "--run-dir", answering(t, map[string]any{"/status": daemon.Status{}}))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, _ := cmd.CombinedOutput()
	if want := fmt.Sprintf("needs root, runs as user %d: use sudo", 65534); !strings.Contains(string(out), want) {
		t.Errorf("no %q in\n%s", want, out)
	}
}
