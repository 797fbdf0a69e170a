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
type Config struct {
	// Path is the absolute path of the file; empty for Default. Paths in the
	// file are relative to the folder it stands in, and absolute here.
	Path string

	// NodeName names this node in logs and metrics. Default: the host name.
	NodeName string
	// RunDir holds the daemon's lock and what cleanup needs. It also tells two
	// daemons of one machine apart. Default: /run/culvert.
	RunDir string
	// TrustDomain is the mesh's own. Default: cluster.local.
	TrustDomain spiffeid.TrustDomain

	Identity  Identity
	Workloads Workloads
	Pods      Pods
	Policy    Policy
	Mesh      Mesh
	Bypass    Bypass

	// Mode says what happens to plaintext that arrives for a pod, where the
	// policy file does not say otherwise. Default: strict.
	Mode Mode
	// Existing says what becomes of plaintext connections from before a pod's
	// enrolment. Default: keep.
	Existing Existing
	// Loops is the number of event loops. 0, the default: one for each CPU.
	Loops int
	// Cgroup is the cgroup v2 folder at which the connect hooks are attached;
	// every pod must live below it. Empty, the default: the v2 root, wherever
	// it is mounted.
	Cgroup string

	Metrics   Metrics
	AccessLog AccessLog
	Log       Log
	Tunnel    Tunnel
}

// Identity says where SVIDs and trust come from.
type Identity struct {
	CA CA
	// TrustFile adds roots of other trust domains and a deny list; see
	// ParseTrust. Empty, the default: none.
	TrustFile string
}

// CA is the embedded authority.
type CA struct {
	// Dir holds its certificates and keys. Default: /var/lib/culvert/ca.
	Dir string
	// LeafTTL is the life of a workload's certificate, 1s to 2160h; it is
	// renewed at half of it. Default: 24h.
	LeafTTL time.Duration
}

// Workloads says where the list of workloads is.
type Workloads struct {
	File string // default: workloads.yaml
}

// Pods says where the list of this node's pods is.
type Pods struct {
	File string // default: pods.yaml
}

// Policy says where the rules are.
type Policy struct {
	File string // empty, the default: no rules
}

// Mesh says which addresses belong to the mesh.
type Mesh struct {
	// CIDRs are ranges inside which an address that no workload has is refused
	// rather than passed on in plaintext. Default: none.
	CIDRs []netip.Prefix
}

// Bypass says which addresses are left alone.
type Bypass struct {
	// CIDRs are ranges to which enrolled pods connect untouched, in plaintext.
	// Default: none.
	CIDRs []netip.Prefix
}

// Metrics is the HTTP endpoint of the node.
type Metrics struct {
	// Address serves /metrics and /healthz/ready. Default: 127.0.0.1:15020.
	Address netip.AddrPort
}

// AccessLog is the line written for each connection that has ended.
type AccessLog struct {
	Format Format // default: auto
	// Queue is how many lines may wait for a slow reader before further ones
	// are dropped and counted, 1 to 1048576. Default: 4096.
	Queue int
}

// Log is the daemon's own log, on standard error.
type Log struct {
	Level  slog.Level // default: info
	Format Format     // default: auto
}

// Tunnel has the times of sessions between nodes.
type Tunnel struct {
	// Idle is how long a session without streams is kept. Default: 5m.
	Idle time.Duration
	// HandshakeTimeout bounds dial and handshake of a session. Default: 10s.
	HandshakeTimeout time.Duration
	// ConnectTimeout bounds the connection to the application at the far end.
	// Default: 10s.
	ConnectTimeout time.Duration
	// PingAfter is the silence after which a session's peer is asked whether it
	// is alive. Default: 10s.
	PingAfter time.Duration
	// DeadAfter is the silence after which a session is given up; longer than
	// PingAfter. Default: 20s.
	DeadAfter time.Duration
	// Memory is what peers can make the node use, in MiB: half for what is
	// queued for applications that do not take it, half for the sessions and
	// streams that peers hold open. 1 to 65536; 0: 256, or a quarter of Go's
	// memory limit where that is less.
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

// Format is the form of log lines.
type Format string

// The formats.
const (
	FormatAuto Format = "auto" // text on a terminal, JSON otherwise
	FormatJSON Format = "json"
	FormatText Format = "text"
)
