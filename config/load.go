// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config/strict"
	"github.com/culvert-mesh/culvert/internal/input"
)

// The defaults, as the file would spell them.
const (
	defaultRunDir      = "/run/culvert"
	defaultTrustDomain = "cluster.local"
	defaultCADir       = "/var/lib/culvert/ca"
	defaultWorkloads   = "workloads.yaml"
	defaultPods        = "pods.yaml"
	defaultMetrics     = "127.0.0.1:15020"
)

// Bounds of numbers and times. They keep out slips of a unit, not opinions.
const (
	maxLoops   = 1024
	maxQueue   = 1 << 20 // lines
	maxMemory  = 1 << 16 // MiB
	minTime    = 100 * time.Millisecond
	maxTime    = 24 * time.Hour
	minLeafTTL = time.Second
	maxLeafTTL = 90 * 24 * time.Hour
)

// Default returns the configuration of an empty file that stands in folder dir.
func Default(dir string) *Config {
	name, err := os.Hostname()
	if err != nil || name == "" {
		name = "localhost"
	}
	return &Config{
		Node:        Node{Name: name},
		RunDir:      defaultRunDir,
		TrustDomain: spiffeid.RequireTrustDomainFromString(defaultTrustDomain),
		Identity:    Identity{CA: CA{Dir: defaultCADir, LeafTTL: 24 * time.Hour}},
		Workloads:   Workloads{File: filepath.Join(dir, defaultWorkloads)},
		Pods:        Pods{File: filepath.Join(dir, defaultPods)},
		Mode:        ModeStrict,
		Existing:    ExistingKeep,
		Seccomp:     SeccompEnforce,
		Metrics:     Metrics{Address: netip.MustParseAddrPort(defaultMetrics)},
		AccessLog:   AccessLog{Format: FormatAuto, Queue: 4096},
		Log:         Log{Level: slog.LevelInfo, Format: FormatAuto},
		Tunnel: Tunnel{
			Idle:             5 * time.Minute,
			HandshakeTimeout: 10 * time.Second,
			ConnectTimeout:   10 * time.Second,
			PingAfter:        10 * time.Second,
			DeadAfter:        20 * time.Second,
		},
	}
}

// Load reads the file at path. A mistake in it is a *strict.Error, a file that
// cannot be used an *input.Error.
func Load(path string) (*Config, error) {
	data, err := input.Read(path, input.Max)
	var e *input.Error
	if errors.As(err, &e) && errors.Is(err, fs.ErrNotExist) {
		e.Mend = "put the configuration there, or name another with --config"
	}
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

// Parse reads data as the file at path, which need not exist.
func Parse(path string, data []byte) (*Config, error) {
	full, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("find configuration %s: %w", path, err)
	}
	dir := filepath.Dir(full)
	c := Default(dir)
	c.Path = full
	err = strict.Read(path, data, func(o *strict.Object) { c.read(o, dir) })
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Config) read(o *strict.Object, dir string) {
	file := func(o *strict.Object, name string, dst *string, allowed string) {
		strict.Scalar(o, name, dst, allowed, func(text string) (string, error) {
			return resolve(dir, text)
		})
	}
	optional := func(o *strict.Object, name string, dst *string, allowed string) {
		strict.Scalar(o, name, dst, allowed, func(text string) (string, error) {
			if text == "" {
				return "", nil
			}
			return resolve(dir, text)
		})
	}
	const aFile, aDir = "the path of a file", "the path of a folder"

	o.Object("node", func(o *strict.Object) {
		strict.Scalar(o, "name", &c.Node.Name, "a host name, such as node-1", parseNodeName)
	})
	strict.Scalar(o, "runDir", &c.RunDir, aDir, func(text string) (string, error) { return resolveRunDir(dir, text) })
	o.TrustDomain("trustDomain", &c.TrustDomain)
	o.Object("identity", func(o *strict.Object) {
		o.Object("ca", func(o *strict.Object) {
			file(o, "dir", &c.Identity.CA.Dir, aDir)
			o.Duration("leafTTL", &c.Identity.CA.LeafTTL, minLeafTTL, maxLeafTTL)
		})
		optional(o, "trustFile", &c.Identity.TrustFile, aFile+`, or "" for none`)
	})
	o.Object("workloads", func(o *strict.Object) { file(o, "file", &c.Workloads.File, aFile) })
	o.Object("pods", func(o *strict.Object) { file(o, "file", &c.Pods.File, aFile) })
	o.Object("policy", func(o *strict.Object) { optional(o, "file", &c.Policy.File, aFile+`, or "" for no rules`) })
	o.Object("mesh", func(o *strict.Object) { prefixes(o, &c.Mesh.CIDRs) })
	o.Object("bypass", func(o *strict.Object) { prefixes(o, &c.Bypass.CIDRs) })
	strict.Enum(o, "mode", &c.Mode, ModeStrict, ModePermissive)
	strict.Enum(o, "existing", &c.Existing, ExistingKeep, ExistingReset)
	strict.Enum(o, "seccomp", &c.Seccomp, SeccompEnforce, SeccompLog, SeccompDisabled)
	o.Int("loops", &c.Loops, "loops", 0, maxLoops)
	optional(o, "cgroup", &c.Cgroup, aDir+` of cgroup v2, or "" for its root`)
	o.Object("metrics", func(o *strict.Object) {
		strict.Scalar(o, "address", &c.Metrics.Address, "address:port, such as "+defaultMetrics+" or [::]:15020", parseAddrPort)
	})
	o.Object("accessLog", func(o *strict.Object) {
		strict.Enum(o, "format", &c.AccessLog.Format, FormatAuto, FormatJSON, FormatText)
		o.Int("queue", &c.AccessLog.Queue, "lines", 1, maxQueue)
	})
	o.Object("log", func(o *strict.Object) {
		strict.Scalar(o, "level", &c.Log.Level, "debug, info, warn, error", ParseLevel)
		strict.Enum(o, "format", &c.Log.Format, FormatAuto, FormatJSON, FormatText)
	})
	o.Object("tunnel", func(o *strict.Object) {
		t := &c.Tunnel
		o.Duration("idle", &t.Idle, minTime, maxTime)
		o.Duration("handshakeTimeout", &t.HandshakeTimeout, minTime, maxTime)
		o.Duration("connectTimeout", &t.ConnectTimeout, minTime, maxTime)
		o.Duration("pingAfter", &t.PingAfter, minTime, maxTime)
		o.Duration("deadAfter", &t.DeadAfter, minTime, maxTime)
		o.Int("memory", &t.Memory, "MiB", 0, maxMemory)
		if t.DeadAfter <= t.PingAfter {
			name := "deadAfter"
			if !o.Has(name) {
				name = "pingAfter"
			}
			o.Fail(name, "deadAfter longer than pingAfter", "deadAfter is %s, pingAfter %s", t.DeadAfter, t.PingAfter)
		}
	})
}

// resolve makes a path of the file absolute.
func resolve(dir, text string) (string, error) {
	switch {
	case text == "":
		return "", errors.New("is empty")
	case strings.ContainsRune(text, 0):
		return "", errors.New("has a zero byte in it")
	case filepath.IsAbs(text):
		return filepath.Clean(text), nil
	default:
		return filepath.Join(dir, text), nil
	}
}

// maxRunDir bounds the run folder: the path of its admin socket must fit into a
// socket's address, 108 bytes with a zero at the end (unix(7)).
const maxRunDir = 107 - len("/admin.sock")

func resolveRunDir(dir, text string) (string, error) {
	path, err := resolve(dir, text)
	if err == nil && len(path) > maxRunDir {
		err = fmt.Errorf("is %d bytes long in full, and at most %d leave room for its socket's name", len(path), maxRunDir)
	}
	return path, err
}

func parseNodeName(text string) (string, error) {
	if text == "" || len(text) > 253 || strings.ContainsAny(text, " \t\r\n/\x00\"") {
		return "", fmt.Errorf("%q is not valid", text)
	}
	return text, nil
}

// parseAddrPort takes an address and a port; 0 lets the kernel choose one.
func parseAddrPort(text string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not an address and a port", text)
	}
	if host == "" {
		return netip.AddrPort{}, fmt.Errorf("%q has no address; 0.0.0.0 is each of the node's", text)
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no IP address", host)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no port; a port is from 0 to 65535", port)
	}
	return netip.AddrPortFrom(a, uint16(n)), nil
}

// ParseLevel reads a level of the log: debug, info, warn, error.
func ParseLevel(text string) (slog.Level, error) {
	switch text {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("%q is not known", text)
}

// prefixes reads cidrs, without host bits: a range with them is a slip more
// often than a wish.
func prefixes(o *strict.Object, dst *[]netip.Prefix) {
	strict.List(o, "cidrs", dst, "address ranges, such as 10.0.0.0/8 or fd00::/8", func(text string) (netip.Prefix, error) {
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil:
			return p, fmt.Errorf("%q is not valid", text)
		case p.Addr().Is4In6():
			return p, fmt.Errorf("%q is an IPv4 range in IPv6 clothes; write it as IPv4", text)
		case p != p.Masked():
			return p, fmt.Errorf("%q has bits beyond its length; did you mean %s?", text, p.Masked())
		}
		return p, nil
	})
}
