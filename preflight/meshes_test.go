// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The rules of other meshes in a pod are named: those of nftables (which iptables
// writes today), those of iptables' older kind, and rules by mark. Rules of somebody
// else's are left alone.
func TestOtherMeshes(t *testing.T) {
	for _, tt := range []struct {
		name         string
		set          func() error
		state        State
		detail, mend string
	}{
		{"Istio, iptables", func() error { return nftChain("nat", "ISTIO_OUTPUT") }, Fail, "Istio has rules in it: ISTIO_OUTPUT", "dataplane-mode=none"},
		{"Istio, nftables", func() error { return nftChain("istio-ambient-nat", "output") }, Fail, "Istio has rules in it: istio-ambient-nat", "dataplane-mode=none"},
		{"Linkerd", func() error { return nftChain("nat", "PROXY_INIT_OUTPUT") }, Fail, "Linkerd has rules in it: PROXY_INIT_OUTPUT", "linkerd.io/inject: disabled"},
		{"Kuma", func() error { return nftChain("nat", "KUMA_MESH_OUTBOUND") }, Fail, "Kuma has rules in it: KUMA_MESH_OUTBOUND", "kuma.io/sidecar-injection: disabled"},
		{"Consul", func() error { return nftChain("nat", "CONSUL_PROXY_OUTPUT") }, Fail, "Consul has rules in it: CONSUL_PROXY_OUTPUT", "connect-inject"},
		{"Istio, older iptables", func() error { return legacyTable(unix.AF_INET, unix.SOL_IP, "ISTIO_OUTPUT") }, Fail, "Istio has rules in it: ISTIO_OUTPUT", "dataplane-mode=none"},
		{"Linkerd, older ip6tables", func() error { return legacyTable(unix.AF_INET6, unix.SOL_IPV6, "PROXY_INIT_REDIRECT") }, Fail, "Linkerd has rules in it: PROXY_INIT_REDIRECT", "linkerd.io/inject"},
		{"Istio, a rule", func() error { return markRule(0x111, 100) }, Fail, "mark 0x111 to table 100", "dataplane-mode=none"},
		{"somebody else's", all(
			func() error { return nftChain("nat", "KUBE-SERVICES") },
			func() error { return markRule(0x111, 101) },
			func() error { return legacyTable(unix.AF_INET, unix.SOL_IP, "DOCKER") },
		), OK, "none in 1 pod", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, ns := withPod(t)
			do(t, ns, tt.set)
			wants(t, n.look(n.command(), nothing), "other meshes", tt.state, tt.detail, tt.mend)
			if tt.state != OK {
				return
			}
			// They are seen, and are no matter.
			do(t, ns, func() error {
				found, err := rulesOf(netlink.RuleList)
				for _, want := range []string{"KUBE-SERVICES", "mark 0x111 to table 101", "DOCKER"} {
					if !slices.Contains(found, want) {
						t.Errorf("no %s in %v", want, found)
					}
				}
				return err
			})
		})
	}
}

// A pod whose rules cannot be listed as a whole is not said to have none; a kernel
// without rules of IPv6 has none.
func TestRulesThatCannotBeListed(t *testing.T) {
	n, _ := withPod(t)
	for _, tt := range []struct {
		err          error
		state        State
		detail, mend string
	}{
		{netlink.ErrDumpInterrupted, Warn, "look at its rules: list the rules", "nft list ruleset"},
		{unix.EAFNOSUPPORT, OK, "none in 1 pod", ""},
	} {
		m := n.machine()
		m.facts.rules = func(family int) ([]netlink.Rule, error) {
			if family == unix.AF_INET6 {
				return nil, tt.err
			}
			return netlink.RuleList(family)
		}
		wants(t, Run(t.Context(), m), "other meshes", tt.state, tt.detail, tt.mend)
	}
}

func markRule(mark uint32, table int) error {
	r := netlink.NewRule()
	mask := uint32(0xfff)
	r.Mark, r.Mask, r.Table, r.Priority, r.Family = mark, &mask, table, 32764, unix.AF_INET
	return netlink.RuleAdd(r)
}

// nftChain adds a chain to a table of nftables, which it makes.
func nftChain(table, chain string) error {
	const batchBegin, batchEnd = 16, 17 // linux/netfilter/nfnetlink.h
	message := func(kind uint16, flags uint16, family uint8, resource uint16, attrs ...[]byte) []byte {
		body := []byte{family, 0, byte(resource >> 8), byte(resource)}
		for i, a := range attrs {
			if a != nil {
				body = append(body, nl.NewRtAttr(i+1, a).Serialize()...)
			}
		}
		head := make([]byte, unix.SizeofNlMsghdr)
		binary.NativeEndian.PutUint32(head, uint32(len(head)+len(body)))
		binary.NativeEndian.PutUint16(head[4:], kind)
		binary.NativeEndian.PutUint16(head[6:], unix.NLM_F_REQUEST|flags)
		return append(head, body...)
	}
	const subsystem = unix.NFNL_SUBSYS_NFTABLES << 8
	// Attributes by their numbers: of a table 1 is the name, of a chain 1 the table's
	// and 3 its own.
	batch := message(batchBegin, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	batch = append(batch, message(subsystem|unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, unix.AF_INET, 0, nl.ZeroTerminated(table))...)
	batch = append(batch, message(subsystem|unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE|unix.NLM_F_ACK, unix.AF_INET, 0, nl.ZeroTerminated(table), nil, nl.ZeroTerminated(chain))...)
	batch = append(batch, message(batchEnd, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)...)

	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(int64(5 * time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return err
	}
	if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	if _, _, err = unix.Recvfrom(fd, answer, 0); err != nil {
		return err
	}
	if code := int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}

// legacyTable gives the table nat of iptables' older kind a chain: the built-in
// chains accept, the new one returns. (struct ipt_replace, ipt_entry,
// xt_standard_target, xt_error_target.)
func legacyTable(family, level int, chain string) error {
	const soReplace = 64          // IPT_SO_SET_REPLACE, IP6T_SO_SET_REPLACE
	entrySize, offsets := 112, 88 // struct ipt_entry, and in it target_offset and next_offset
	if family == unix.AF_INET6 {
		entrySize, offsets = 168, 140
	}
	word := binary.NativeEndian
	var entries []byte
	entry := func(target []byte) (at int) {
		at = len(entries)
		head := make([]byte, entrySize)
		word.PutUint16(head[offsets:], uint16(entrySize))
		word.PutUint16(head[offsets+2:], uint16(entrySize+len(target)))
		entries = append(append(entries, head...), target...)
		return at
	}
	standard := func(verdict int32) []byte {
		b := make([]byte, 40)
		word.PutUint16(b, uint16(len(b)))
		word.PutUint32(b[32:], uint32(verdict))
		return b
	}
	failing := func(name string) []byte {
		b := make([]byte, 64)
		word.PutUint16(b, uint16(len(b)))
		copy(b[2:], "ERROR")
		copy(b[32:], name)
		return b
	}
	const accept, back = -2, -5 // -NF_ACCEPT-1, XT_RETURN
	head := make([]byte, 96)    // up to the entries
	copy(head, "nat")
	const hooks = 1<<0 | 1<<1 | 1<<3 | 1<<4 // PREROUTING, LOCAL_IN, LOCAL_OUT, POSTROUTING
	word.PutUint32(head[32:], hooks)
	for _, hook := range []int{0, 1, 3, 4} {
		at := entry(standard(accept))
		word.PutUint32(head[44+4*hook:], uint32(at))
		word.PutUint32(head[64+4*hook:], uint32(at))
	}
	entry(failing(chain))
	entry(standard(back))
	entry(failing("ERROR"))
	const count = 7
	word.PutUint32(head[36:], count)
	word.PutUint32(head[40:], uint32(len(entries)))

	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	info := make([]byte, sizeofGetInfo) // which makes the table, and says how many counters it has
	copy(info, "nat")
	if err := getsockopt(fd, level, soGetInfo, info); err != nil {
		return err
	}
	had := word.Uint32(info[sizeofGetInfo-8:])
	counters := make([]byte, 16*had) // where the kernel puts those of the old one
	word.PutUint32(head[84:], had)
	word.PutUint64(head[88:], uint64(uintptr(unsafe.Pointer(&counters[0]))))
	whole := append(head, entries...)
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), soReplace, uintptr(unsafe.Pointer(&whole[0])), uintptr(len(whole)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// FuzzChains takes whatever a kernel, of whatever version, may hand out.
func FuzzChains(f *testing.F) {
	f.Add(append(append([]byte{64, 0}, "ERROR\x00"...), make([]byte, 56)...))
	f.Add(errorTarget)
	f.Fuzz(func(t *testing.T, entries []byte) {
		if n := len(chainsIn(entries)); n > len(entries)/64+1 {
			t.Errorf("%d chains in %d bytes", n, len(entries))
		}
	})
}
