// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// memoryGroup makes a cgroup with a limit, where the machine has the controller,
// and returns its directory and the file that says how much is used at most.
func memoryGroup(t *testing.T, limit int) (dir, peak string) {
	t.Helper()
	name := fmt.Sprintf("%s-%d", prefix, os.Getpid())
	for _, kind := range []struct{ root, file, peak string }{
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"},
		{"/sys/fs/cgroup", "memory.max", "memory.peak"},
	} {
		dir := filepath.Join(kind.root, name)
		if _, err := os.Stat(filepath.Join(kind.root, "cgroup.procs")); err != nil || os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() {
			var err error
			// A process that has ended leaves its cgroup a little later.
			for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
				if err = os.Remove(dir); !errors.Is(err, unix.EBUSY) {
					break
				}
				<-time.After(20 * time.Millisecond)
			}
			if err != nil {
				t.Errorf("remove the cgroup: %v", err)
			}
		})
		if os.WriteFile(filepath.Join(dir, kind.file), []byte(strconv.Itoa(limit)), 0) == nil {
			return dir, filepath.Join(dir, kind.peak)
		}
	}
	t.Skip("no memory controller can be had here: neither of cgroup v1 nor of v2")
	return "", ""
}

// A daemon in a cgroup of 256 MB keeps to it, and says so: thousands of
// connections with bytes in flight do not get it killed.
func TestMemoryLimit(t *testing.T) {
	userSpace(t)
	const limit, connections = 256 << 20, 2000
	group, peak := memoryGroup(t, limit)
	binary := wrapped(t, "echo $$ > "+group+"/cgroup.procs")
	e := setup(t)
	one, two := e.Pod(1, 1), e.Pod(2, 1)
	app, err := two.Echo(8080)
	e.must(err)
	d := []*lab.Daemon{e.startOn(e.Nodes[0], lab.DaemonConfig{Binary: binary}), e.startOn(e.Nodes[1], lab.DaemonConfig{})}
	want := strconv.Itoa(limit / 100 * 90)
	if log := d[0].LogTail(50); !strings.Contains(log, "memory is limited by the cgroup") || !strings.Contains(log, "limit="+want) {
		t.Errorf("the log does not say so:\n%s", log)
	}
	if log := d[1].LogTail(50); strings.Contains(log, "limit="+want) {
		t.Errorf("control: a daemon in no such cgroup says so too:\n%s", log)
	}
	if status := e.command(d[0], "status"); !strings.Contains(status, "memory limit") {
		t.Errorf("it is not in the status:\n%s", status)
	}

	text := strings.Repeat("culvert ", 2<<10)
	var all []*net.TCPConn
	defer func() {
		for _, c := range all {
			c.Close()
		}
	}()
	for i := range connections {
		c, err := e.dial(one, app.Addr(4+2*(i%2)))
		if err != nil {
			t.Fatalf("connection %d: %v\n%s", i, err, d[0].LogTail(5))
		}
		all = append(all, c)
		if err := exchange(c, text); err != nil {
			t.Fatalf("connection %d: %v\n%s", i, err, d[0].LogTail(5))
		}
	}
	for i, c := range all {
		c.SetDeadline(time.Now().Add(20 * time.Second * lab.Slowness()))
		if err := exchange(c, text); err != nil {
			t.Fatalf("connection %d, with all open: %v\n%s", i, err, d[0].LogTail(5))
		}
	}
	if err := d[0].Ended(); err != nil {
		t.Errorf("%v:\n%s", err, d[0].LogTail(10))
	}
	b, err := os.ReadFile(peak)
	if errors.Is(err, fs.ErrNotExist) { // memory.peak came with 5.19
		t.Log("the kernel does not say how much was used at most")
		return
	}
	e.must(err)
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	e.must(err)
	t.Logf("%d MiB were used at most", n>>20)
	// It is the daemon's own that is seen, and it is far from the limit.
	if least, most := 4<<20, limit/2; n < least || n > most {
		t.Errorf("%d bytes were used at most, want %d to %d", n, least, most)
	}
}
