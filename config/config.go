// SPDX-License-Identifier: Apache-2.0

// Package config is the one configuration file of ztunnel: a struct of plain
// values, its defaults, and a reader that refuses whatever it does not know
// (package strict has the rules). It starts nothing and watches nothing. Which
// workloads and pods there are stands in files of their own, whose places the
// configuration names.
package config

import (
	"log/slog"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Config is what a daemon is told. Load fills in every default; a Config made by
// hand starts from Default.
//
// Path aside, it has the shape of the file: a field's name, in lower camel case,
// is its key, and its comment is what docs/configuration.md says of that key (see
// TestKeysAreDocumented). The default stands there as Default has it; a comment
// ends with a "Default:" of its own only where that would be empty or another one
// on each machine.
type Config struct {
	// Path is the absolute path of the file; empty for Default. Paths in the
	// file are relative to the folder it stands in, and absolute here.
	Path string

	Node Node
	// The daemon's lock and admin socket, and what a release needs. Two daemons of
	// one machine need one each, and a `metrics.address` each. At most 96 bytes in
	// full
	RunDir string
	// The mesh's own SPIFFE trust domain
	TrustDomain spiffeid.TrustDomain

	Identity  Identity
	Workloads Workloads
	Pods      Pods
	Policy    Policy
	Mesh      Mesh
	Bypass    Bypass

	// What happens to plaintext for a pod, where no [mode](#modes) of the policy
	// file says otherwise: `strict`: refused; `permissive`: let in beside mutual TLS
	Mode Mode
	// What becomes of plaintext connections with the mesh that a pod has when it is
	// enrolled: `keep`: they go on until they end, and are listed; `reset`: they are
	// ended
	Existing Existing
	// What becomes of system calls that the daemon [has no need
	// of](../SECURITY.md#what-the-daemon-may-do): `enforce`: they are refused, and the
	// kernel logs them; `log`: it logs them only; `disabled`: there is no filter
	Seccomp Seccomp
	// Event loops; 0: one for each CPU that the process may use (`cpu.max` of its cgroup, or `GOMAXPROCS`)
	Loops int
	// The cgroup v2 folder at which the connect hooks are attached, a path below its
	// mount point or within the hierarchy. Every process of an enrolled pod must live
	// below it. Default: the v2 root
	Cgroup string

	Metrics   Metrics
	AccessLog AccessLog
	Log       Log
	Tunnel    Tunnel
}

// Node is this node.
type Node struct {
	// This node's name in logs. Default: the host name
	Name string
}

// Identity says where SVIDs and trust come from.
type Identity struct {
	CA CA
	// Further roots, and a deny list: [trust](#certificates-and-trust)
	TrustFile string
}

// CA is the embedded authority.
type CA struct {
	// The embedded authority's folder; made on first start
	Dir string
	// Life of a workload's certificate, 1s to 2160h; it is renewed at half of it
	LeafTTL time.Duration
}

// Workloads is the list of workloads.
type Workloads struct {
	// Who is in the mesh
	File string
}

// Pods is the list of this node's pods.
type Pods struct {
	// Which pods this node has
	File string
}

// Policy is the rules and modes.
type Policy struct {
	// Rules and modes; without it everything is allowed, and `mode` holds for all
	File string
}

// Mesh says which addresses belong to the mesh.
type Mesh struct {
	// Ranges inside which an address that no workload has is refused, not passed on
	CIDRs []netip.Prefix
}

// Bypass says which addresses are left alone.
type Bypass struct {
	// Ranges that enrolled pods reach untouched, in plaintext. It wins over the two
	// above
	CIDRs []netip.Prefix
}

// Metrics is the HTTP endpoint of the node.
type Metrics struct {
	// Serves `/metrics`, `/healthz/live` and `/healthz/ready`. `/healthz/ready`
	// answers 200 once each pod was tried: `culvert_pods{state="enrolling"}` counts
	// those that failed and are tried again
	Address netip.AddrPort
}

// AccessLog is the line written for each connection that has ended.
type AccessLog struct {
	// `json`, `text`; `auto`: text on a terminal, else JSON
	Format Format
	// Lines that may wait for a slow reader; further ones are dropped and counted
	Queue int
}

// Log is the daemon's own log, on standard error.
type Log struct {
	// `debug`, `info`, `warn`, `error`
	Level slog.Level
	// As above
	Format Format
}

// Tunnel has the times and bounds of sessions between nodes.
type Tunnel struct {
	// How long a session without streams is kept
	Idle time.Duration
	// For the handshake of a session
	HandshakeTimeout time.Duration
	// For the connection to a peer, and to an application
	ConnectTimeout time.Duration
	// Silence after which a peer is asked whether it is alive
	PingAfter time.Duration
	// Silence after which a session is given up, if the question was left unanswered;
	// also one whose peer reads nothing for as long, though it sends. Longer than
	// `tunnel.pingAfter`
	DeadAfter time.Duration
	// MiB that peers can make the node use: half for what is queued for applications
	// that do not take it, half for what peers hold open; 0: 256, or a quarter of Go's
	// memory limit (`GOMEMLIMIT`) where that is less
	Memory int
}

// Mode is what happens to plaintext that arrives for a pod.
type Mode string

// The modes.
const (
	ModeStrict     Mode = "strict"     // plaintext from outside the pod is refused
	ModePermissive Mode = "permissive" // it is let in
)

// Existing is what becomes of connections that a pod has with the mesh when it is
// enrolled.
type Existing string

// The ways.
const (
	ExistingKeep  Existing = "keep"  // they go on, in plaintext, and are listed
	ExistingReset Existing = "reset" // they are ended
)

// Seccomp is what becomes of system calls that the daemon has no need of.
type Seccomp string

// The ways.
const (
	SeccompEnforce  Seccomp = "enforce"  // they are refused
	SeccompLog      Seccomp = "log"      // the kernel logs them
	SeccompDisabled Seccomp = "disabled" // nothing
)

// Format is the form of log lines.
type Format string

// The formats.
const (
	FormatAuto Format = "auto" // text on a terminal, JSON otherwise
	FormatJSON Format = "json"
	FormatText Format = "text"
)
