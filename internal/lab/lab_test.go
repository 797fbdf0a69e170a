// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/capture"
)

func newLab(t *testing.T) (*Lab, context.Context) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces: run it as root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	l, err := New(ctx, Config{Prefix: "culverttest"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(filepath.Join(netnsDir, l.ID+"*")); len(left) > 0 {
			t.Errorf("left behind: %s", left)
		}
		if _, err := os.Stat(l.Dir); err == nil {
			t.Errorf("left behind: %s", l.Dir)
		}
	})
	return l, ctx
}

// The control of every "0 times on the wire" of ours: with no mesh, the capture sees the marker, the segments that
// carry payload, and the applications their true peers, in both families, also where the marker is cut in two.
func TestPlaintextIsSeen(t *testing.T) {
	l, ctx := newLab(t)
	client, server := l.Pod(1, 1), l.Pod(2, 2)
	app, err := server.Echo(7)
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range []int{4, 6} {
		t.Run(fmt.Sprintf("v%d", family), func(t *testing.T) {
			const marker, cut = "a-marker-in-the-clear", "a-marker-cut-in-two"
			pcap := filepath.Join(t.TempDir(), "wire.pcap")
			wire, err := capture.Start(capture.Config{
				NS: l.Nodes[0].NS, Interface: l.Nodes[0].Uplink(l.Nodes[1]), Markers: []string{marker, cut}, Pcap: pcap,
			})
			if err != nil {
				t.Fatal(err)
			}
			defer wire.Close()

			c, err := client.Dial(ctx, app.Addr(family))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			sent := 0
			for _, part := range []string{marker, cut[:7], cut[7:]} { // Go sets TCP_NODELAY: a segment each
				if err := Exchange(c, part); err != nil {
					t.Fatalf("echo of %q: %v", part, err)
				}
				sent += len(part)
			}
			c.CloseWrite()
			if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
				t.Fatalf("after the end: %q, %v", rest, err)
			}

			peers := app.Peers()
			if got := peers[len(peers)-1].Addr(); got != client.Addr(family) {
				t.Errorf("the server saw %s, want %s", got, client.Addr(family))
			}
			for i := range 2 {
				if got := wire.Seen(i); got != 2 {
					t.Errorf("marker %d was seen %d times, want 2: there and back", i, got)
				}
			}
			pods := PodCIDRs()
			segments, payload := wire.Payload(func(s capture.Segment) bool { return s.Between(pods...) && s.Port(7) })
			if segments < 6 || payload != int64(2*sent) {
				t.Errorf("%d segments with %d bytes, want at least 6 with %d", segments, payload, 2*sent)
			}
			if n, _ := wire.Payload(func(s capture.Segment) bool { return s.Port(15008) }); n != 0 {
				t.Errorf("%d segments on port 15008", n)
			}
			if unreadable := wire.Unreadable(); unreadable != 0 {
				t.Errorf("%d frames cannot be read", unreadable)
			}
			if err := wire.Close(); err != nil {
				t.Error(err)
			}
			out, err := exec.Command("tcpdump", "-nr", pcap, "port", "7").CombinedOutput()
			if err != nil || strings.Count(string(out), "\n") < 10 {
				t.Errorf("tcpdump reads the file: %v\n%s", err, out)
			}
		})
	}
}

func TestApplications(t *testing.T) {
	l, ctx := newLab(t)
	web, err := l.Pod(2, 1).HTTP(8080, WhoAmI("web"))
	if err != nil {
		t.Fatal(err)
	}
	mail, err := l.Pod(1, 2).Greet(25, "mail")
	if err != nil {
		t.Fatal(err)
	}
	client := l.Pod(1, 1)
	for _, family := range []int{4, 6} {
		resp, err := client.HTTPClient().Post("http://"+web.Addr(family).String(), "text/plain", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := fmt.Sprintf("web: you are %s, and you sent 5 bytes\nhello", client.Addr(family)); string(body) != want || resp.StatusCode != http.StatusOK {
			t.Errorf("%s %q, want %q", resp.Status, body, want)
		}

		// Same node, and the server speaks first.
		c, err := client.Dial(ctx, mail.Addr(family))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		line, err := bufio.NewReader(c).ReadString('\n')
		if want := fmt.Sprintf("220 mail %s\r\n", c.LocalAddr()); err != nil || line != want {
			t.Errorf("greeting %q, %v; want %q", line, err, want)
		}
	}
}

// A process of a pod sees the pod's interfaces and everything else of the machine.
func TestStartEntersTheNetworkOnly(t *testing.T) {
	l, ctx := newLab(t)
	p := l.Pod(2, 1)
	out := filepath.Join(l.Dir, "out")
	f, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("sh", "-c", "readlink /proc/self/ns/net /proc/self/ns/mnt; cat /proc/self/net/fib_trie")
	cmd.Stdout = f
	proc, err := p.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	if err := proc.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitN(string(b), "\n", 3)
	ours := func(name string) string { s, _ := os.Readlink("/proc/self/ns/" + name); return s }
	if len(lines) < 3 || lines[0] == ours("net") || lines[1] != ours("mnt") || !strings.Contains(lines[2], p.V4.String()) {
		t.Errorf("the process saw:\n%s", b)
	}
}

// With a cgroup of its own a lab's processes live in it, and it goes with the lab.
func TestOwnCgroup(t *testing.T) {
	root := CgroupRoot()
	if root == "" {
		t.Skip("cgroup v2 is not mounted here")
	}
	l, err := New(t.Context(), Config{Prefix: "culverttest", OwnCgroup: true})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, l.ID)
	// The child outlives its parent, which is all that the lab knows of.
	proc, err := l.Pod(1, 1).Start(exec.Command("sh", "-c", "sleep 60 & wait"))
	if err == nil {
		err = Until(t.Context(), "parent and child are in the cgroup", func() error {
			members, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if got := strings.Fields(string(members)); err != nil || len(got) != 2 || !slices.Contains(got, fmt.Sprint(proc.PID())) {
				return fmt.Errorf("in it are %q, %w", got, err)
			}
			return nil
		})
	}
	if err := errors.Join(err, l.Close()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Errorf("left behind: %s", dir)
	}
}

// What a killed run leaves is removed by the next one, and a running lab is left alone.
func TestSweepRemovesWhatAKilledRunLeft(t *testing.T) {
	const prefix = "culvertsweep"
	if dir := os.Getenv("CULVERT_LAB_VICTIM"); dir != "" {
		l, err := New(t.Context(), Config{Prefix: prefix, Nodes: 1, PodsPerNode: 1})
		if err != nil {
			t.Fatal(err)
		}
		p, err := l.Pod(1, 1).Start(exec.Command("sleep", "600"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("lab %s %d\n", l.ID, p.PID())
		select {} // killed here
	}
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces: run it as root")
	}
	victim := exec.Command(os.Args[0], "-test.run=^TestSweepRemovesWhatAKilledRunLeft$")
	victim.Env = append(os.Environ(), "CULVERT_LAB_VICTIM=1")
	pipe, err := victim.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	var id string
	var pid int
	if _, err := fmt.Fscanf(pipe, "lab %s %d\n", &id, &pid); err != nil {
		t.Fatal(err)
	}

	if removed, err := Sweep(t.Context(), prefix); err != nil || len(removed) != 0 {
		t.Errorf("a running lab: swept %s, %v", removed, err)
	}
	victim.Process.Kill()
	victim.Wait()
	removed, err := Sweep(t.Context(), prefix)
	if err != nil || len(removed) != 1 || removed[0] != id {
		t.Errorf("swept %s, %v; want %s", removed, err, id)
	}
	if _, err := startTime(pid); err == nil {
		t.Errorf("process %d still runs", pid)
	}
	if left, _ := filepath.Glob(filepath.Join(netnsDir, id+"*")); len(left) > 0 {
		t.Errorf("left behind: %s", left)
	}
	if removed, err := Sweep(t.Context(), prefix); err != nil || len(removed) != 0 {
		t.Errorf("the second sweep: %s, %v", removed, err)
	}
}

func TestUntilSaysWhatItWaitedFor(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := Until(ctx, "pigs fly", func() error { return net.ErrClosed })
	if err == nil || !strings.Contains(err.Error(), "pigs fly") || !strings.Contains(err.Error(), net.ErrClosed.Error()) {
		t.Errorf("error: %v", err)
	}
}

// State finds each kind of thing that a daemon leaves in a pod, and nothing where there was none.
func TestStateFindsWhatIsLeft(t *testing.T) {
	l, _ := newLab(t)
	n, p := l.Nodes[0], l.Pod(1, 1)
	if s := n.State(p); s != "" {
		t.Errorf("a fresh pod has:\n%s", s)
	}
	err := p.Do(func() error {
		rule := netlink.NewRule()
		rule.Mark, rule.Table, rule.Family = 7, 123, netlink.FAMILY_V6
		if err := netlink.RuleAdd(rule); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		_, everything, _ := net.ParseCIDR("0.0.0.0/0")
		route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: everything, Table: 123, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST}
		if err := netlink.RouteAdd(route); err != nil {
			return err
		}
		return sysctl("ipv4.fwmark_reflect", "1")
	})
	if err != nil {
		t.Fatal(err)
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	lookup, err := link.AttachNetNs(p.NS.FD(), program)
	if err != nil {
		t.Fatal(err)
	}
	defer lookup.Close()
	for _, want := range []string{"rule:", "route:", "sysctl ipv4/fwmark_reflect: 1, was 0", "link:"} {
		if s := n.State(p); !strings.Contains(s, want) {
			t.Errorf("no %q in:\n%s", want, s)
		}
	}
	if s := n.State(l.Pod(1, 2)); s != "" {
		t.Errorf("its neighbour has:\n%s", s)
	}
}
