// SPDX-License-Identifier: Apache-2.0

package docs

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// land is where machines are: a PID namespace, which takes all that runs on them
// with it, also when the test is killed. Their networks, mounts and pins go with
// their last process.
type land struct {
	t        *testing.T
	ctx      context.Context
	init     int    // its first process, as the test sees it
	dir      string // each machine sees it
	machines map[string]*machine
	names    []string // in order
}

// machine is a network, a mount and a name of its own, with a shell of root's.
// /run, /tmp and /mnt are its own and empty; what it writes to /etc, /usr/local and
// /var/lib is its own too; all else, but for Go's cache, it can only read. Its folder
// is a copy of the repository.
type machine struct {
	name  string
	land  *land
	in    io.Writer
	out   *bufio.Scanner // standard output and error
	shell *exec.Cmd
}

// prepare makes a machine of a mount namespace. $1 is its name, $2 the folder that
// all of them see, $3 the repository, $4 the test's own mount namespace.
const prepare = `set -e
test "$(readlink /proc/self/ns/mnt)" != "$4"
mount --make-rprivate /
hostname "$1"
mount -t tmpfs none /mnt
mkdir /mnt/culvert /mnt/land /mnt/bin
mount --bind "$2" /mnt/land
tar -C "$3" --exclude=./.git --exclude=./bin --exclude=./out -c . | tar -C /mnt/culvert -x
for d in etc usr/local var/lib; do
	mkdir -p "/mnt/layers/$d/upper" "/mnt/layers/$d/work"
	mount -t overlay -o "lowerdir=/$d,upperdir=/mnt/layers/$d/upper,workdir=/mnt/layers/$d/work" none "/$d"
done
mount -t tmpfs none /run
mount -t tmpfs none /tmp
mount -t bpf bpf /sys/fs/bpf
cache=$(go env GOCACHE)
mkdir -p "$cache"
mount --bind "$cache" "$cache"
mount -o remount,bind,ro /
ip link set lo up
for name in systemctl journalctl scp; do ln -s /mnt/land/stand-in "/mnt/bin/$name"; done
echo $$ >"/mnt/land/$1.pid"
export PATH="/usr/local/bin:/mnt/bin:$PATH"
cd /mnt/culvert
set +e
trap 'echo "$BASH_COMMAND" >>/mnt/failed' ERR
`

// newLand makes machines, connected where there are two: 192.0.2.1 and 192.0.2.2.
func newLand(t *testing.T, names ...string) *land {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes namespaces: run it as root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute*lab.Slowness())
	t.Cleanup(cancel)
	l := &land{t: t, ctx: ctx, dir: t.TempDir(), machines: map[string]*machine{}, names: names}
	copyFile(t, os.Args[0], filepath.Join(l.dir, "stand-in"))

	first := exec.CommandContext(ctx, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", "echo there; exec sleep infinity")
	first.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdout, err := first.StdoutPipe()
	l.must(err)
	l.must(first.Start())
	t.Cleanup(func() { first.Process.Kill(); first.Wait() })
	_, err = bufio.NewReader(stdout).ReadString('\n')
	l.must(err)
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", first.Process.Pid, first.Process.Pid))
	l.must(err)
	_, err = fmt.Sscan(string(children), &l.init)
	l.must(err)

	repository, err := filepath.Abs("../..")
	l.must(err)
	mounts, err := os.Readlink("/proc/self/ns/mnt")
	l.must(err)
	for i, name := range names {
		m := &machine{name: name, land: l}
		m.shell = exec.CommandContext(ctx, "nsenter", "--target", fmt.Sprint(l.init), "--pid", "--mount", "--",
			"unshare", "--mount", "--net", "--uts", "bash", "-s", name, l.dir, repository, mounts)
		m.in, err = m.shell.StdinPipe()
		l.must(err)
		out, err := m.shell.StdoutPipe()
		l.must(err)
		m.shell.Stderr = m.shell.Stdout
		m.out = bufio.NewScanner(out)
		m.out.Buffer(nil, 1<<20)
		l.must(m.shell.Start())
		t.Cleanup(func() { m.shell.Process.Kill(); m.shell.Wait() })
		l.machines[name] = m
		m.do(prepare)
		if i == 1 {
			m.do(fmt.Sprintf("ip link add eth0 type veth peer name eth0 netns $(cat /mnt/land/%s.pid)", names[0]))
		}
	}
	for i, name := range names {
		if len(names) > 1 {
			l.machines[name].do(fmt.Sprintf("ip addr add 192.0.2.%d/24 dev eth0 && ip link set eth0 up", i+1))
		}
	}
	return l
}

// follow does what blocks say, and wants to see what they say that one sees. What
// takes effect a moment later is looked at again until it has. The commands that
// fail are to be those of which the page shows the error.
func (l *land) follow(blocks []block) {
	l.t.Helper()
	for _, b := range blocks {
		on := []string{b.on}
		if b.on == "both" || b.on == "" {
			on = l.names
		}
		for _, name := range on {
			m := l.machines[name]
			switch {
			case m == nil:
				l.t.Fatalf("%s: there is no machine %s", b, name)
			case b.lang == "yaml":
				m.write(b)
			case b.lang == "sh":
				m.show(b)
			}
		}
	}
}

// show runs a block of commands until its output is as shown.
func (m *machine) show(b block) {
	m.land.t.Helper()
	var first, got, failed, miss string
	for deadline := time.Now().Add(10 * time.Second * lab.Slowness()); ; time.Sleep(100 * time.Millisecond) {
		got, failed = m.run(b.text)
		if miss = missing(b.want, got); miss == "" {
			break
		}
		if first == "" {
			first = fmt.Sprintf("and at first no line as %q in\n%s", miss, got)
		}
		if time.Now().After(deadline) {
			m.land.t.Fatalf("%s, on %s: no line as %q in\n%s\n%s", b, m.name, miss, got, first)
		}
	}
	if failed != "" && !strings.Contains(b.want, "curl: (") {
		m.land.t.Fatalf("%s, on %s: failed: %s\n%s", b, m.name, failed, got)
	}
}

// write makes the file that a block of YAML says it is, in its first line.
func (m *machine) write(b block) {
	m.land.t.Helper()
	path, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(b.text), "# "), ":")
	if !filepath.IsAbs(path) {
		m.land.t.Fatalf("%s does not say which file it is", b)
	}
	m.do(fmt.Sprintf("mkdir -p %s && cat >%s <<'END-OF-FILE'\n%sEND-OF-FILE\n", filepath.Dir(path), path, b.text))
}

// do runs commands that are the test's own.
func (m *machine) do(commands string) string {
	m.land.t.Helper()
	out, failed := m.run(commands)
	if failed != "" {
		m.land.t.Fatalf("on %s: failed: %s\n%s", m.name, failed, out)
	}
	return out
}

// run gives commands to the machine's shell, and returns what they have written and
// those that failed.
func (m *machine) run(commands string) (out, failed string) {
	m.land.t.Helper()
	const end = "-- end of the commands, failed:"
	if _, err := fmt.Fprintf(m.in, "%s\necho; echo '%s' $(cat /mnt/failed 2>/dev/null); rm -f /mnt/failed\n", commands, end); err != nil {
		m.land.t.Fatalf("on %s: %v", m.name, err)
	}
	var b strings.Builder
	for m.out.Scan() {
		if failed, ok := strings.CutPrefix(m.out.Text(), end); ok {
			return b.String(), strings.TrimSpace(failed)
		}
		b.WriteString(m.out.Text() + "\n")
	}
	m.land.t.Fatalf("on %s: the shell has ended (%v) in\n%s\n%s", m.name, m.out.Err(), commands, &b)
	return "", ""
}

func (l *land) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}
