// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/culvert-mesh/culvert/internal/netns"
)

// Process is a process that the lab has started. It is killed, at the latest, when the lab is closed.
type Process struct {
	pid  int
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; to be read once done is closed
}

// Start starts a command in the pod's network namespace, and in no other namespace of the pod.
func (p *Pod) Start(cmd *exec.Cmd) (*Process, error) { return p.Node.lab.start(p.NS, cmd) }

// Start starts a command in the node's network namespace.
func (n *Node) Start(cmd *exec.Cmd) (*Process, error) { return n.lab.start(n.NS, cmd) }

func (l *Lab) start(ns *netns.NS, cmd *exec.Cmd) (*Process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	// A process group of its own: Ctrl-C is for the maker of the lab, who ends its processes in order.
	cmd.SysProcAttr.Setpgid = true
	if l.cgroup != "" {
		g, err := os.Open(l.cgroup)
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
		}
		defer g.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(g.Fd())
	}
	// The child is forked from the thread that runs this function, and inherits its network namespace.
	if err := ns.Do(cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	p := &Process{pid: cmd.Process.Pid, cmd: cmd, done: make(chan struct{})}
	err := l.journal.addProcess("process", p.pid) // before Wait: until then the pid is not reused
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err != nil && !os.IsNotExist(err) {
		p.Kill()
		return nil, fmt.Errorf("write down process %d: %w", p.pid, err)
	}
	return p, nil
}

// PID is the process's number.
func (p *Process) PID() int { return p.pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Ended returns an error once the process has ended: with it, Until gives up.
func (p *Process) Ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("process %d has ended: %v", p.pid, p.cmd.ProcessState)
	default:
		return nil
	}
}

// Wait waits for the end of the process and returns how it ended, as exec.Cmd.Wait does.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("wait for process %d: %w", p.pid, context.Cause(ctx))
	}
}

// Signal sends a signal; to a process that has ended it is nothing.
func (p *Process) Signal(s os.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := p.cmd.Process.Signal(s); err != nil && err != os.ErrProcessDone {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	return nil
}

// Kill ends the process as kill -9 does and waits for its end.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}
