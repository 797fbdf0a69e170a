// SPDX-License-Identifier: Apache-2.0

//go:build amd64 || arm64

package privilege

import (
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// What the daemon asks of the kernel once it is confined. It was traced while the
// end-to-end tests ran, and is completed by what was not seen then and may come: what
// Go's runtime calls (runtime/sys_linux_*.s), the C library's threads and allocator
// in a build with cgo, and close relatives of what was seen, which a newer Go may
// take instead. What only one architecture has is in calls_GOARCH.go.
//
// What is not here: whatever starts a program, mounts, traces or looks into other
// processes, enters a namespace that is no network's, makes devices, changes owners,
// loads modules, sets clocks or keys; io_uring and perf.

// newest is the last system call that this list was made with.
const newest = unix.SYS_RSEQ_SLICE_YIELD

func unconditional() []uint32 {
	return slices.Concat(
		// Bytes, of sockets and files.
		[]uint32{unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_PREADV, unix.SYS_PWRITEV,
			unix.SYS_RECVFROM, unix.SYS_SENDTO, unix.SYS_RECVMSG, unix.SYS_SENDMSG, unix.SYS_RECVMMSG, unix.SYS_SENDMMSG,
			unix.SYS_SPLICE, unix.SYS_SENDFILE, unix.SYS_COPY_FILE_RANGE},
		// Sockets. Which ones may be made is a condition.
		[]uint32{unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_ACCEPT, unix.SYS_ACCEPT4, unix.SYS_CONNECT, unix.SYS_SHUTDOWN,
			unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT},
		// Readiness and descriptors.
		[]uint32{unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2, unix.SYS_PPOLL, unix.SYS_PSELECT6,
			unix.SYS_EVENTFD2, unix.SYS_PIPE2, unix.SYS_CLOSE, unix.SYS_CLOSE_RANGE, unix.SYS_DUP, unix.SYS_DUP3, unix.SYS_FCNTL},
		// Programs, maps and links in the kernel.
		[]uint32{unix.SYS_BPF},
		// Files: those that are watched, sysctls, the run directory, pins, the authority.
		[]uint32{unix.SYS_OPENAT, unix.SYS_OPENAT2, fstatat, unix.SYS_FSTAT, unix.SYS_STATX, unix.SYS_STATFS, unix.SYS_FSTATFS,
			unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2, unix.SYS_READLINKAT, unix.SYS_GETDENTS64, unix.SYS_GETCWD, unix.SYS_LSEEK,
			unix.SYS_MKDIRAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_SYMLINKAT, unix.SYS_LINKAT,
			unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_UMASK, unix.SYS_UTIMENSAT, unix.SYS_FTRUNCATE, unix.SYS_FALLOCATE,
			unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_FLOCK},
		// Memory. That none of it may be executed is a condition.
		[]uint32{unix.SYS_MUNMAP, unix.SYS_MREMAP, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_BRK},
		// Threads. That nothing else is begun is a condition.
		[]uint32{unix.SYS_FUTEX, unix.SYS_SET_ROBUST_LIST, unix.SYS_SET_TID_ADDRESS, unix.SYS_RSEQ, unix.SYS_MEMBARRIER,
			unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_SCHED_SETAFFINITY, unix.SYS_SCHED_GETATTR,
			unix.SYS_GETCPU, unix.SYS_EXIT, unix.SYS_EXIT_GROUP},
		// Signals. To whom they may go is a condition. restart_syscall is made by the
		// kernel, when a process that was stopped goes on.
		[]uint32{unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_RT_SIGTIMEDWAIT, unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL},
		// Time, and the profiler's timers.
		[]uint32{unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_GETRES, unix.SYS_GETTIMEOFDAY,
			unix.SYS_SETITIMER, unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME, unix.SYS_TIMER_DELETE},
		// Who and where it is.
		[]uint32{unix.SYS_GETPID, unix.SYS_GETPPID, unix.SYS_GETTID, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID, unix.SYS_CAPGET,
			unix.SYS_GETRLIMIT, unix.SYS_GETRUSAGE, unix.SYS_SYSINFO, unix.SYS_UNAME, unix.SYS_GETRANDOM},
		ofArch(),
	)
}

func conditional() []rule {
	const (
		all      = ^uint32(0)
		typeMask = 0xf // of a socket's type; the rest are SOCK_CLOEXEC and SOCK_NONBLOCK
		// New namespaces: those of linux/sched.h, but that of time, which only clone3
		// and unshare make.
		namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET
	)
	is := func(argument, value uint32) condition { return condition{argument, all, value} }
	without := func(argument, bits uint32) condition { return condition{argument, bits, 0} }
	ofType := func(value uint32) condition { return condition{1, typeMask, value} }
	self := uint32(os.Getpid())
	return []rule{
		{unix.SYS_SOCKET, [][]condition{
			{is(0, unix.AF_INET), ofType(unix.SOCK_STREAM)},
			{is(0, unix.AF_INET), ofType(unix.SOCK_DGRAM)},
			{is(0, unix.AF_INET6), ofType(unix.SOCK_STREAM)},
			{is(0, unix.AF_INET6), ofType(unix.SOCK_DGRAM)},
			{is(0, unix.AF_UNIX)},
			{is(0, unix.AF_NETLINK), is(2, unix.NETLINK_ROUTE)},
			{is(0, unix.AF_NETLINK), is(2, unix.NETLINK_SOCK_DIAG)},
		}},
		{unix.SYS_SETNS, [][]condition{{is(1, unix.CLONE_NEWNET)}}},
		// Threads, and no processes.
		{unix.SYS_CLONE, [][]condition{{{0, unix.CLONE_THREAD | namespaces, unix.CLONE_THREAD}}}},
		{unix.SYS_MMAP, [][]condition{{without(2, unix.PROT_EXEC)}}},
		{unix.SYS_MPROTECT, [][]condition{{without(2, unix.PROT_EXEC)}}},
		// Names, of the runtime's memory and of threads.
		{unix.SYS_PRCTL, [][]condition{{is(0, unix.PR_SET_VMA)}, {is(0, unix.PR_SET_NAME)}, {is(0, unix.PR_GET_NAME)}}},
		// Whether a descriptor is a terminal; how much waits in a socket.
		{unix.SYS_IOCTL, [][]condition{{is(1, unix.TCGETS)}, {is(1, unix.SIOCINQ)}, {is(1, unix.SIOCOUTQ)}}},
		{unix.SYS_KILL, [][]condition{{is(0, self)}}},
		{unix.SYS_TGKILL, [][]condition{{is(0, self)}}},
		// Its own limits, and its own threads' time slices.
		{unix.SYS_PRLIMIT64, [][]condition{{is(0, 0)}, {is(0, self)}}},
		{unix.SYS_SCHED_SETATTR, [][]condition{{is(0, 0)}}},
	}
}
