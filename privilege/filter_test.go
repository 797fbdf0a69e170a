// SPDX-License-Identifier: Apache-2.0

//go:build amd64 || arm64

package privilege

import (
	"encoding/binary"
	"math"
	"os"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const (
	eperm  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	enosys = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
)

// verdict runs the filter as the kernel does: on struct seccomp_data.
func verdict(t *testing.T, mode Mode, arch, call uint32, arguments ...uint64) uint32 {
	t.Helper()
	program, err := filter(mode)
	if err != nil {
		t.Fatal(err)
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	// The machine of x/net loads words in network order, that of the kernel in its own.
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[offNumber:], call)
	binary.BigEndian.PutUint32(data[offArch:], arch)
	for i, a := range arguments {
		binary.BigEndian.PutUint32(data[offArguments+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[offArguments+8*i+4:], uint32(a>>32))
	}
	n, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(n)
}

func TestFilter(t *testing.T) {
	const high = math.MaxUint32 << 32 // what the kernel does not look at
	pid := uint64(os.Getpid())
	for name, c := range map[string]struct {
		call      uint32
		arguments []uint64
		want      uint32
	}{
		"a stream of IPv4":         {unix.SYS_SOCKET, []uint64{unix.AF_INET, unix.SOCK_STREAM | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK, 0}, unix.SECCOMP_RET_ALLOW},
		"a datagram of IPv6":       {unix.SYS_SOCKET, []uint64{unix.AF_INET6, unix.SOCK_DGRAM, 0}, unix.SECCOMP_RET_ALLOW},
		"a raw socket":             {unix.SYS_SOCKET, []uint64{unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP}, eperm},
		"a packet socket":          {unix.SYS_SOCKET, []uint64{unix.AF_PACKET, unix.SOCK_DGRAM, 0}, eperm},
		"a unix socket":            {unix.SYS_SOCKET, []uint64{unix.AF_UNIX, unix.SOCK_STREAM, 0}, unix.SECCOMP_RET_ALLOW},
		"rtnetlink":                {unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE}, unix.SECCOMP_RET_ALLOW},
		"netfilter":                {unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER}, eperm},
		"a network namespace":      {unix.SYS_SETNS, []uint64{3, unix.CLONE_NEWNET}, unix.SECCOMP_RET_ALLOW},
		"any namespace":            {unix.SYS_SETNS, []uint64{3, 0}, eperm},
		"a mount namespace":        {unix.SYS_SETNS, []uint64{3, unix.CLONE_NEWNS}, eperm},
		"a thread":                 {unix.SYS_CLONE, []uint64{0xd0f00}, unix.SECCOMP_RET_ALLOW}, // as runtime/os_linux.go has it
		"a process":                {unix.SYS_CLONE, []uint64{uint64(unix.SIGCHLD)}, eperm},
		"a process like vfork's":   {unix.SYS_CLONE, []uint64{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}, eperm},
		"a thread elsewhere":       {unix.SYS_CLONE, []uint64{0xd0f00 | unix.CLONE_NEWUSER}, eperm},
		"a thread that hides":      {unix.SYS_CLONE3, []uint64{1, 88}, enosys},
		"memory":                   {unix.SYS_MMAP, []uint64{0, 4096, unix.PROT_READ | unix.PROT_WRITE}, unix.SECCOMP_RET_ALLOW},
		"memory with code":         {unix.SYS_MMAP, []uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC}, eperm},
		"code, from memory":        {unix.SYS_MPROTECT, []uint64{0, 4096, high | unix.PROT_EXEC}, eperm},
		"a name":                   {unix.SYS_PRCTL, []uint64{high | unix.PR_SET_VMA}, unix.SECCOMP_RET_ALLOW},
		"dumpable again":           {unix.SYS_PRCTL, []uint64{unix.PR_SET_DUMPABLE, 1}, eperm},
		"is it a terminal":         {unix.SYS_IOCTL, []uint64{1, unix.TCGETS}, unix.SECCOMP_RET_ALLOW},
		"what a terminal reads":    {unix.SYS_IOCTL, []uint64{1, high | unix.TIOCSTI}, eperm},
		"a signal to itself":       {unix.SYS_TGKILL, []uint64{pid, 7, uint64(unix.SIGURG)}, unix.SECCOMP_RET_ALLOW},
		"a signal to another":      {unix.SYS_TGKILL, []uint64{pid + 1, 7, uint64(unix.SIGURG)}, eperm},
		"a signal to all":          {unix.SYS_KILL, []uint64{math.MaxUint64, uint64(unix.SIGKILL)}, eperm},
		"its own limits":           {unix.SYS_PRLIMIT64, []uint64{0, unix.RLIMIT_NOFILE}, unix.SECCOMP_RET_ALLOW},
		"another's limits":         {unix.SYS_PRLIMIT64, []uint64{pid + 1, unix.RLIMIT_NOFILE}, eperm},
		"its own slice":            {unix.SYS_SCHED_SETATTR, []uint64{0}, unix.SECCOMP_RET_ALLOW},
		"a program":                {unix.SYS_EXECVE, nil, eperm},
		"a program of a handle":    {unix.SYS_EXECVEAT, nil, eperm},
		"a mount":                  {unix.SYS_MOUNT, nil, eperm},
		"a mount by handles":       {unix.SYS_MOVE_MOUNT, nil, eperm},
		"new namespaces":           {unix.SYS_UNSHARE, []uint64{unix.CLONE_NEWNET}, eperm},
		"tracing":                  {unix.SYS_PTRACE, nil, eperm},
		"another's memory":         {unix.SYS_PROCESS_VM_WRITEV, nil, eperm},
		"another's descriptor":     {unix.SYS_PIDFD_GETFD, nil, eperm},
		"a file by its number":     {unix.SYS_OPEN_BY_HANDLE_AT, nil, eperm},
		"a module":                 {unix.SYS_FINIT_MODULE, nil, eperm},
		"io_uring":                 {unix.SYS_IO_URING_SETUP, nil, eperm},
		"perf":                     {unix.SYS_PERF_EVENT_OPEN, nil, eperm},
		"capabilities":             {unix.SYS_CAPSET, nil, eperm},
		"another filter":           {unix.SYS_SECCOMP, nil, eperm},
		"the last that is known":   {newest, nil, eperm},
		"one that is newer":        {newest + 1, nil, enosys},
		"one that is much newer":   {0x3fffffff, nil, enosys},
		"x32":                      {0x40000000 | unix.SYS_READ, nil, unix.SECCOMP_RET_KILL_PROCESS},
		"an entry of the emulated": {math.MaxUint32, nil, unix.SECCOMP_RET_KILL_PROCESS},
	} {
		if got := verdict(t, Enforce, auditArch, c.call, c.arguments...); got != c.want {
			t.Errorf("%s: %#x, want %#x", name, got, c.want)
		}
		want := c.want
		if want != unix.SECCOMP_RET_ALLOW {
			want = unix.SECCOMP_RET_LOG
		}
		if got := verdict(t, Log, auditArch, c.call, c.arguments...); got != want {
			t.Errorf("%s, to be logged: %#x, want %#x", name, got, want)
		}
	}
	if got := verdict(t, Enforce, unix.AUDIT_ARCH_I386, unix.SYS_READ); got != unix.SECCOMP_RET_KILL_PROCESS {
		t.Errorf("a call of another architecture: %#x", got)
	}
}

// Each call of the list is allowed, is there once, and has no condition beside it;
// whatever is not in the list is refused.
func TestFilterIsTheList(t *testing.T) {
	listed := map[uint32]bool{}
	for _, call := range unconditional() {
		if listed[call] {
			t.Errorf("system call %d is listed twice", call)
		}
		listed[call] = true
	}
	for _, r := range conditional() {
		if listed[r.call] {
			t.Errorf("system call %d has conditions, and is allowed without", r.call)
		}
		if got := verdict(t, Enforce, auditArch, r.call, math.MaxUint64, math.MaxUint64, math.MaxUint64, math.MaxUint64); got != eperm {
			t.Errorf("system call %d, whose conditions do not hold: %#x", r.call, got)
		}
	}
	for call := range uint32(newest + 1) {
		if call == unix.SYS_CLONE3 {
			continue
		}
		conditions := false
		for _, r := range conditional() {
			conditions = conditions || r.call == call
		}
		if conditions {
			continue
		}
		if got := verdict(t, Enforce, auditArch, call); (got == unix.SECCOMP_RET_ALLOW) != listed[call] {
			t.Errorf("system call %d: %#x, listed %v", call, got, listed[call])
		}
	}
}
