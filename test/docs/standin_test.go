// SPDX-License-Identifier: Apache-2.0

package docs

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The machines have no systemd and no SSH. These stand in for the commands that the
// pages use: what a unit says is taken from the unit that was installed.

const (
	unitFile = "/usr/local/lib/systemd/system/culvert.service"
	mainPID  = "/run/stand-in.pid"
	journal  = "/run/stand-in.journal"
)

// standIn is the command that the binary was called as.
func standIn(name string, args []string) error {
	switch name {
	case "systemctl":
		return systemctl(args)
	case "journalctl":
		data, err := os.ReadFile(journal)
		if err == nil {
			_, err = os.Stdout.Write(data)
		}
		return err
	case "scp":
		return scp(args)
	}
	return fmt.Errorf("stands in for nothing that is called %s", name)
}

func systemctl(args []string) error {
	verb, now := args[0], false
	for _, a := range args[1:] {
		now = now || a == "--now"
	}
	switch {
	case verb == "daemon-reload":
		return nil
	case verb == "start", verb == "enable" && now:
		return startUnit()
	case verb == "stop", verb == "disable" && now:
		return stopUnit()
	case verb == "restart":
		return errors.Join(stopUnit(), startUnit())
	case verb == "reload":
		pid, err := os.ReadFile(mainPID)
		if err != nil {
			return err
		}
		unit, err := readUnit(unitFile)
		if err != nil {
			return err
		}
		return exec.Command("sh", "-c", strings.ReplaceAll(unit["ExecReload"], "$MAINPID", string(pid))).Run()
	}
	return fmt.Errorf("systemctl: %q is not played here", args)
}

// readUnit returns the settings of a unit that has each once.
func readUnit(path string) (map[string]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for line := range strings.Lines(string(data)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		if _, twice := out[key]; twice {
			return nil, fmt.Errorf("%s has %s twice", path, key)
		}
		out[key] = value
	}
	return out, nil
}

// startUnit starts what ExecStart says, with the capabilities that the unit leaves
// it, and waits until it has said that it is ready.
func startUnit() error {
	unit, err := readUnit(unitFile)
	if err != nil {
		return err
	}
	if unit["Type"] != "notify" || unit["NoNewPrivileges"] != "yes" {
		return fmt.Errorf("%s is of a kind that is not played here", unitFile)
	}
	const socket = "/run/stand-in.notify"
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer os.Remove(socket)
	defer notify.Close()
	log, err := os.OpenFile(journal, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"--no-new-privs", "--bounding-set", "-all," + setprivNames(unit["CapabilityBoundingSet"]), "--"}
	cmd := exec.Command("setpriv", append(args, strings.Fields(unit["ExecStart"])...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "NOTIFY_SOCKET=" + socket}
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ready := make(chan error, 1)
	go func() {
		said := make([]byte, 100)
		n, err := notify.Read(said)
		if err == nil && string(said[:n]) != "READY=1" {
			err = fmt.Errorf("it says %q", said[:n])
		}
		ready <- err
	}()
	select {
	case err := <-ended:
		return fmt.Errorf("it has ended: %v", err)
	case err := <-ready:
		return errors.Join(err, os.WriteFile(mainPID, []byte(strconv.Itoa(cmd.Process.Pid)), 0o600))
	case <-time.After(time.Minute):
		return errors.New("it has not said that it is ready")
	}
}

// setprivNames are the names of capabilities as setpriv(1) has them.
func setprivNames(set string) string {
	var out []string
	for _, c := range strings.Fields(set) {
		out = append(out, "+"+strings.ToLower(strings.TrimPrefix(c, "CAP_")))
	}
	return strings.Join(out, ",")
}

func stopUnit() error {
	data, err := os.ReadFile(mainPID)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(data))
	if err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil {
		return err
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 30_000)
	if err == nil && n == 0 {
		err = errors.New("it has not ended")
	}
	return errors.Join(err, os.Remove(mainPID))
}

// scp copies a folder to the machine of an address: `scp -rp FROM root@ADDRESS:TO`.
func scp(args []string) error {
	if len(args) != 3 || args[0] != "-rp" {
		return fmt.Errorf("scp: %q is not played here", args)
	}
	address, to, _ := strings.Cut(strings.TrimPrefix(args[2], "root@"), ":")
	other := map[string]string{"192.0.2.1": "node-1", "192.0.2.2": "node-2"}[address]
	pid, err := os.ReadFile(filepath.Join("/mnt/land", other+".pid"))
	if err != nil {
		return err
	}
	script := fmt.Sprintf("tar -C %s -c . | nsenter --target %s --mount -- sh -c 'mkdir %s && tar -C %s -xp'", args[1], strings.TrimSpace(string(pid)), to, to)
	out, err := exec.Command("sh", "-c", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
