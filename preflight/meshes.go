// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// mesh is another one, by what it puts into a pod's namespace.
type mesh struct {
	name     string
	prefixes []string // of chains, or of tables
	rules    []string // of policy routing
	mend     string
}

var meshes = []mesh{
	{
		// tools/istio-iptables, tools/istio-nftables, cni/pkg/iptables of istio/istio.
		name: "Istio", prefixes: []string{"ISTIO_", "istio-"},
		rules: []string{"mark 0x111 to table 100", "mark 0x539 to table 133"},
		mend:  "label the pod istio.io/dataplane-mode=none and sidecar.istio.io/inject=false, and make it anew",
	},
	{
		// pkg/iptables of linkerd/linkerd2-proxy-init.
		name: "Linkerd", prefixes: []string{"PROXY_INIT_"},
		mend: "annotate the pod linkerd.io/inject: disabled, and make it anew",
	},
	{
		// pkg/transparentproxy of kumahq/kuma.
		name: "Kuma", prefixes: []string{"KUMA_MESH_"},
		mend: "label the pod kuma.io/sidecar-injection: disabled, and make it anew",
	},
	{
		// sdk/iptables of hashicorp/consul.
		name: "Consul", prefixes: []string{"CONSUL_PROXY_"},
		mend: "annotate the pod consul.hashicorp.com/connect-inject: \"false\", and make it anew",
	},
}

func (m mesh) owns(rule string) bool {
	return slices.Contains(m.rules, rule) || slices.ContainsFunc(m.prefixes, func(p string) bool { return strings.HasPrefix(rule, p) })
}

// rulesOf names the chains and tables of the packet filter, and the rules by mark
// that list gives, of the calling thread's namespace.
func rulesOf(list func(family int) ([]netlink.Rule, error)) ([]string, error) {
	out, err := nftChains()
	if err != nil {
		return nil, fmt.Errorf("list the chains of nftables: %w", err)
	}
	for _, f := range []struct {
		family, level int
		tables        string
	}{
		{unix.AF_INET, unix.SOL_IP, "/proc/thread-self/net/ip_tables_names"},
		{unix.AF_INET6, unix.SOL_IPV6, "/proc/thread-self/net/ip6_tables_names"},
	} {
		names, err := os.ReadFile(f.tables) // to ask for a table that is not there would make it
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, table := range strings.Fields(string(names)) {
			chains, err := legacyChains(f.family, f.level, table)
			if err != nil {
				return nil, fmt.Errorf("list the chains of the table %s: %w", table, err)
			}
			out = append(out, chains...)
		}
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := list(family)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without them: the check of policy routing says so
		}
		if err != nil {
			return nil, fmt.Errorf("list the rules: %w", err)
		}
		for _, r := range rules {
			if r.Mark != 0 {
				out = append(out, fmt.Sprintf("mark %#x to table %d", r.Mark, r.Table))
			}
		}
	}
	return out, nil
}

// nftChains names the chains of nf_tables, those of iptables-nft among them, and
// their tables. A kernel without it has none.
func nftChains() ([]string, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC})
	messages, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range messages {
		if len(m) < nl.SizeofNfgenmsg {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[nl.SizeofNfgenmsg:])
		if err != nil {
			return nil, err
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.NFTA_CHAIN_NAME || a.Attr.Type == unix.NFTA_CHAIN_TABLE {
				out = append(out, unix.ByteSliceToString(a.Value))
			}
		}
	}
	return out, nil
}

// linux/netfilter_ipv4/ip_tables.h; those of IPv6 are the same.
const (
	soGetInfo    = 64 // IPT_SO_GET_INFO
	soGetEntries = 65 // IPT_SO_GET_ENTRIES

	sizeofGetInfo = 84 // struct ipt_getinfo; its last word is the size of the entries
	entriesAt     = 40 // in struct ipt_get_entries: name, size, padding
	maxEntries    = 64 << 20
)

// errorTarget stands before the name of each chain that is not built in: in front
// of it are the target's size, 64, and its name (struct xt_error_target).
var errorTarget = append([]byte{64, 0}, "ERROR\x00"...)

// legacyChains names the chains of a table of iptables' older kind.
func legacyChains(family, level int, table string) ([]string, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	info := make([]byte, sizeofGetInfo)
	copy(info, table)
	if err := getsockopt(fd, level, soGetInfo, info); err != nil {
		return nil, err
	}
	size := binary.NativeEndian.Uint32(info[sizeofGetInfo-4:])
	if size > maxEntries {
		return nil, fmt.Errorf("it has %d bytes", size)
	}
	entries := make([]byte, entriesAt+size)
	copy(entries, table)
	binary.NativeEndian.PutUint32(entries[32:], size)
	if err := getsockopt(fd, level, soGetEntries, entries); err != nil {
		return nil, err // changed in between, for one
	}
	return chainsIn(entries[entriesAt:]), nil
}

// chainsIn names the chains in a table's entries.
func chainsIn(entries []byte) (out []string) {
	const name, size = 32, 30 // where in the target, and how long
	for rest := entries; ; {
		at := bytes.Index(rest, errorTarget)
		if at < 0 || at+name+size > len(rest) {
			return out
		}
		if text := unix.ByteSliceToString(rest[at+name : at+name+size]); text != "ERROR" { // that ends the table
			out = append(out, text)
		}
		rest = rest[at+name+size:]
	}
}

func getsockopt(fd, level, option int, value []byte) error {
	size := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
