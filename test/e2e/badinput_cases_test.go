// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// badFile is one file that is wrong in one way. What is said of it stands in
// testdata/badinput.txt, under the same kind and name.
type badFile struct {
	name string
	file string             // of the kind's files; empty: the first
	text string             // what it holds, or
	make func(string) error // makes what stands at this path
	when int                // atStart and whileRunning where it is 0

	obedient bool // read by a root that obeys the file's mode
}

const (
	atStart = 1 + iota
	whileRunning
)

// kinds are the kinds of files, each with its first.
var kinds = []struct {
	name, file string
	cases      []badFile
}{
	{"configuration", "config.yaml", wrongConfigs()},
	{"workloads", "workloads.yaml", slicesOf(everyThird(wrongWorkloads), everyThird(wrongText("workloads")), wrongPlaces())},
	{"pods", "pods.yaml", slicesOf(wrongPods, wrongPlaces())},
	{"policy", "policy.yaml", slicesOf(wrongRules, wrongModes, wrongPlaces())},
	{"trust", "trust.yaml", slicesOf(wrongTrust, wrongPlaces())},
	{"ca", "ca", everyThird(wrongAuthorities)},
}

// everyThird leaves the others of many cases out while the daemon runs.
func everyThird(cases []badFile) []badFile {
	cases = slices.Clone(cases)
	for i := range cases {
		if i%3 != 0 {
			cases[i].when = atStart
		}
	}
	return cases
}

func slicesOf(parts ...[]badFile) (all []badFile) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// wrongPlaces are those where no file that can be read is.
func wrongPlaces() []badFile {
	return []badFile{
		{name: "gone", make: func(string) error { return nil }},
		{name: "a folder", make: func(p string) error { return os.Mkdir(p, 0o700) }},
		{name: "a named pipe", make: func(p string) error { return syscall.Mkfifo(p, 0o600) }},
		{name: "a link to a device", make: linkTo("/dev/zero")},
		{name: "a link to nowhere", make: linkTo("nowhere.yaml")},
		{name: "a loop of links", make: func(p string) error { return os.Symlink(strings.TrimSuffix(filepath.Base(p), besides), p) }},
		{name: "for nobody to read", make: func(p string) error { return os.WriteFile(p, nil, 0) }, when: atStart, obedient: true},
		{name: "empty by now", text: "\n", when: whileRunning},
	}
}

func linkTo(to string) func(string) error { return func(p string) error { return os.Symlink(to, p) } }

// wrongText is what the reader of YAML refuses of any file. key: a list.
func wrongText(key string) []badFile {
	return []badFile{
		{name: "a tab as indentation", text: key + ":\n\t- name: a\n"},
		{name: "a zero byte", text: key + ":\n- name: a\x00b\n"},
		{name: "Latin-1", text: key + ":\n- name: b\xe4r\n"},
		{name: "UTF-16", text: "\xff\xfe" + key + ":"},
		{name: "CR LF and a mistake", text: key + ":\r\n- name: A\r\n  addresses: [10.0.0.1]\r\n"},
		{name: "a byte order mark and a mistake", text: "\ufeff" + key + ": 5\n"},
		{name: "a key twice", text: key + ": []\n" + key + ": []\n"},
		{name: "a second document", text: key + ": []\n---\n" + key + ": []\n"},
		{name: "a list at the root", text: "- name: a\n"},
		{name: "a bracket that is not closed", text: key + ": [\n"},
		{name: "an anchor", text: key + ": &all\n- name: a\n"},
		{name: "aliases that grow (billion laughs)", text: "a: &a [x, x]\n" + key + ": [*a, *a]\n"},
		{name: "many anchors", text: key + ": [" + strings.Repeat("&a x, ", 100_000) + "]\n"},
		{name: "a merge", text: key + ":\n- <<: {name: a}\n"},
		{name: "a tag", text: key + ": !!seq []\n"},
		{name: "nested without end", text: key + ": " + strings.Repeat("[", 500_000) + "\n"},
		{name: "17 MiB", text: strings.Repeat("# a comment of 32 bytes, all told\n", 524_288)},
	}
}

// ownFolder keeps what should not start from the machine's own authority.
const ownFolder = "identity: {ca: {dir: ca}}\n"

func wrongConfigs() []badFile {
	places := wrongPlaces()
	return slicesOf([]badFile{
		{name: "an unknown key", text: "node:\n  nam: x\n"},
		{name: "a duration without a unit", text: "tunnel: {idle: 5}\n"},
		{name: "a duration that is negative", text: "tunnel: {idle: -5s}\n"},
		{name: "a duration that is too long", text: "tunnel: {connectTimeout: 48h}\n"},
		{name: "dead before it is asked", text: "tunnel: {pingAfter: 30s}\n"},
		{name: "the life of leaves in days", text: "identity: {ca: {leafTTL: 30d}}\n"},
		{name: "a number of loops that is negative", text: "loops: -1\n"},
		{name: "a number that is none", text: "loops: 0.5\n"},
		{name: "a queue of nothing", text: "accessLog: {queue: 0}\n"},
		{name: "a port that is negative", text: "metrics: {address: \"127.0.0.1:-1\"}\n"},
		{name: "a port that is too large", text: "metrics: {address: \"127.0.0.1:65536\"}\n"},
		{name: "an address without a port", text: "metrics: {address: 127.0.0.1}\n"},
		{name: "a port without an address", text: "metrics: {address: \":15020\"}\n"},
		{name: "a host name for an address", text: "metrics: {address: \"localhost:15020\"}\n"},
		{name: "a range with host bits", text: "mesh:\n  cidrs: [10.0.0.1/8]\n"},
		{name: "a range without a length", text: "mesh:\n  cidrs: [10.0.0.0]\n"},
		{name: "a range that is v4-mapped", text: "bypass:\n  cidrs: [\"::ffff:10.0.0.0/104\"]\n"},
		{name: "an IPv6 range that is not quoted", text: "bypass: {cidrs: [fd00::]}\n"},
		{name: "a range for a list", text: "mesh: {cidrs: 10.0.0.0/8}\n"},
		{name: "a trust domain as an ID", text: "trustDomain: spiffe://cluster.local\n"},
		{name: "a trust domain in capitals", text: "trustDomain: Cluster.Local\n"},
		{name: "a level of the log", text: "log: {level: verbose}\n"},
		{name: "a format of the log", text: "log: {format: xml}\n"},
		{name: "a path of nothing", text: "workloads: {file: \"\"}\n"},
		{name: "a path that is a list", text: "pods: {file: [a, b]}\n"},
		{name: "a node's name with a space", text: "node: {name: a b}\n"},
		{name: "a value that is missing", text: "runDir:\n"},
		{name: "a mapping that is text", text: "tunnel: fast\n"},
		{name: "a mode", text: "mode: disable\n"},
		{name: "a mode as Istio has it", text: "mode: STRICT\n"},
		{name: "a mode that is a mapping", text: "mode: {mesh: strict}\n"},
		{name: "what becomes of connections", text: "existing: drop\n"},
		{name: "what becomes of system calls", text: "seccomp: off\n"},
		{name: "a memory that is negative", text: "tunnel: {memory: -1}\n"},
		{name: "a memory with a unit", text: "tunnel: {memory: 64MiB}\n"},
		{name: "a memory in bytes", text: "tunnel: {memory: 268435456}\n"},
		{name: "a key in lower case", text: "accesslog: {format: json}\n"},
		{name: "a misspelt key that makes another wrong", text: "tunnel: {deadAftr: 60s, pingAfter: 30s}\n"},
		{name: "a run folder that is a file", text: "runDir: workloads.yaml\n" + ownFolder},
		{name: "a run folder below a file", text: "runDir: workloads.yaml/run\n" + ownFolder},
		{name: "a run folder that is too long", text: "runDir: /run/" + strings.Repeat("x", 107-len("/run/")-len("/admin.sock")+1) + "\n" + ownFolder},
		{name: "a run folder that is empty", text: "runDir: \"\"\n" + ownFolder},
		{name: "a cgroup that is not there", text: "cgroup: /culvert-e2e-none\nrunDir: run\n" + ownFolder},
		{name: "a cgroup that is a list", text: "cgroup: [a]\nrunDir: run\n" + ownFolder},
		{name: "a cgroup that is another folder", text: "cgroup: /proc\nrunDir: run\n" + ownFolder},
		{name: "a cgroup that is a file of one", text: "cgroup: /cgroup.procs\nrunDir: run\n" + ownFolder},
		{name: "a tab as indentation", text: "node:\n\tname: a\n"},
		{name: "nested without end", text: strings.Repeat("{a: ", 500_000)},
	}, places[:len(places)-1])
}

var wrongWorkloads = []badFile{
	{name: "an unknown key", text: "workloads:\n- name: a\n  adresses: [10.0.0.1]\n"},
	{name: "no name", text: "workloads:\n- addresses: [10.0.0.1]\n"},
	{name: "no addresses", text: "workloads:\n- name: a\n"},
	{name: "an empty list of addresses", text: "workloads:\n- name: a\n  addresses: []\n"},
	{name: "a name that is true behind one that is no", text: "workloads:\n- name: no\n  addresses: [10.0.0.1]\n- name: true\n  addresses: [10.0.0.2]\n"},
	{name: "a name that is a number", text: "workloads:\n- name: 1.5e3\n  addresses: [10.0.0.1]\n"},
	{name: "a name in capitals", text: "workloads:\n- name: Web\n  addresses: [10.0.0.1]\n"},
	{name: "a name twice", text: "workloads:\n- name: a\n  addresses: [10.0.0.1]\n- name: a\n  addresses: [10.0.0.2]\n"},
	{name: "a UID twice", text: "workloads:\n- {name: a, uid: x, addresses: [10.0.0.1]}\n- {name: b, uid: x, addresses: [10.0.0.2]}\n"},
	{name: "an address twice", text: "workloads:\n- name: a\n  addresses: [10.0.0.1]\n- name: b\n  addresses: [10.0.0.1]\n"},
	{name: "an address of four bytes", text: "workloads:\n- name: a\n  addresses: [10.0.0.300]\n"},
	{name: "an address with a length", text: "workloads:\n- name: a\n  addresses: [10.0.0.1/32]\n"},
	{name: "an address with a port", text: "workloads:\n- name: a\n  addresses: [\"10.0.0.1:80\"]\n"},
	{name: "an address with a zone", text: "workloads:\n- name: a\n  addresses: [\"fd00::1%eth0\"]\n"},
	{name: "an address that is v4-mapped", text: "workloads:\n- name: a\n  addresses: [\"::ffff:10.0.0.1\"]\n"},
	{name: "an address that is link-local", text: "workloads:\n- name: a\n  addresses: [\"fe80::1\"]\n"},
	{name: "an address that is loopback", text: "workloads:\n- name: a\n  addresses: [127.0.0.1]\n"},
	{name: "an address that is multicast", text: "workloads:\n- name: a\n  addresses: [224.0.0.1]\n"},
	{name: "an address that is nobody's", text: "workloads:\n- name: a\n  addresses: [0.0.0.0]\n"},
	{name: "an IPv6 address that is not quoted", text: "workloads:\n- {name: a, addresses: [fd00::]}\n"},
	{name: "a protocol", text: "workloads:\n- name: a\n  protocol: http\n  addresses: [10.0.0.1]\n"},
	{name: "a trust domain", text: "workloads:\n- name: a\n  trustDomain: a/b\n  addresses: [10.0.0.1]\n"},
	{name: "a service account with a slash", text: "workloads:\n- name: a\n  serviceAccount: a/b\n  addresses: [10.0.0.1]\n"},
	{name: "an item that is empty", text: "workloads:\n-\n"},
}

var wrongPods = []badFile{
	{name: "an unknown key", text: "pods:\n- {name: a, netns: /run/netns/a, addresses: [10.0.0.1], pid: 1}\n"},
	{name: "no name", text: "pods:\n- {netns: /run/netns/a, addresses: [10.0.0.1]}\n"},
	{name: "no namespace", text: "pods:\n- {name: a, addresses: [10.0.0.1]}\n"},
	{name: "no addresses", text: "pods:\n- {name: a, netns: /run/netns/a}\n"},
	{name: "a namespace by a relative path", text: "pods:\n- {name: a, netns: netns/a, addresses: [10.0.0.1]}\n"},
	{name: "a name that is a number", text: "pods:\n- {name: 7, netns: /run/netns/a, addresses: [10.0.0.1]}\n"},
	{name: "two pods of a name", text: "pods:\n- {name: a, netns: /run/netns/a, addresses: [10.0.0.1]}\n- {name: a, netns: /run/netns/b, addresses: [10.0.0.2]}\n"},
	{name: "two pods of an address", text: "pods:\n- {name: a, netns: /run/netns/a, addresses: [10.0.0.1]}\n- {name: b, netns: /run/netns/b, addresses: [10.0.0.1]}\n"},
	{name: "two pods of a namespace", text: "pods:\n- {name: a, netns: /run/netns/a, addresses: [10.0.0.1]}\n- {name: b, netns: /run/netns/../netns/a, addresses: [10.0.0.2]}\n"},
	{name: "two IPv4 addresses", text: "pods:\n- {name: a, netns: /run/netns/a, addresses: [10.0.0.1, 10.0.0.2]}\n"},
	{name: "an address with a zone", text: "pods:\n- {name: a, netns: /run/netns/a, addresses: [\"fd00::1%lo\"]}\n"},
	{name: "another trust domain", text: "pods:\n- {name: a, netns: /run/netns/a, addresses: [10.0.0.1], trustDomain: other.example}\n"},
	{name: "a UID with a slash", text: "pods:\n- {name: a, netns: /run/netns/a, addresses: [10.0.0.1], uid: a/b}\n"},
	{name: "the key of another file", text: "workloads: []\n"},
	{name: "a mapping for a list", text: "pods: {name: a}\n"},
	{name: "nested without end", text: "pods:\n" + strings.Repeat("- ", 500_000) + "a\n"},
}

var wrongRules = []badFile{
	{name: "an unknown key", text: "rules:\n- {name: a, denySources: [spiffe://cluster.local/ns/a/sa/b]}\n"},
	{name: "no name", text: "rules:\n- {denySource: [spiffe://cluster.local/ns/a/sa/b]}\n"},
	{name: "nobody is denied", text: "rules:\n- {name: a, denySource: []}\n"},
	{name: "an ID that is a name", text: "rules:\n- {name: a, denySource: [batch]}\n"},
	{name: "an ID with a trailing slash", text: "rules:\n- {name: a, denySource: [spiffe://cluster.local/ns/a/]}\n"},
	{name: "an ID with a star", text: "rules:\n- {name: a, denySource: [\"spiffe://cluster.local/ns/a/*\"]}\n"},
	{name: "a name twice", text: "rules:\n- {name: a, denySource: [spiffe://cluster.local/ns/a/sa/b]}\n- {name: a, denySource: [spiffe://cluster.local/ns/a/sa/c]}\n"},
	{name: "a name that is built in", text: "rules:\n- {name: default-allow, denySource: [spiffe://cluster.local/ns/a/sa/b]}\n"},
	{name: "one ID for a list", text: "rules:\n- {name: a, denySource: spiffe://cluster.local/ns/a/sa/b}\n"},
	{name: "a list for rules is text", text: "rules: none\n"},
}

var wrongModes = []badFile{
	{name: "modes: an unknown key", text: "modes:\n- {name: a, namspace: demo, workload: web, mode: permissive}\n"},
	{name: "modes: no name", text: "modes:\n- {mode: permissive}\n"},
	{name: "modes: a name of a rule", text: "rules:\n- {name: a, denySource: [spiffe://cluster.local/ns/a/sa/b]}\nmodes:\n- {name: a, mode: permissive}\n"},
	{name: "modes: a name that is built in", text: "modes:\n- {name: default-mode, mode: permissive}\n"},
	{name: "modes: a mode", text: "modes:\n- {name: a, mode: disable}\n"},
	{name: "modes: a mode as Istio has it", text: "modes:\n- {name: a, mode: PERMISSIVE}\n"},
	{name: "modes: neither a mode nor ports", text: "modes:\n- {name: a, namespace: demo}\n"},
	{name: "modes: two for the mesh", text: "modes:\n- {name: a, mode: strict}\n- {name: b, mode: permissive}\n"},
	{name: "modes: two for a namespace", text: "modes:\n- {name: a, namespace: demo, mode: strict}\n- {name: b, namespace: demo, mode: permissive}\n"},
	{name: "modes: two for a workload", text: "modes:\n- {name: a, namespace: demo, workload: web, mode: strict}\n- {name: b, workload: web, namespace: demo, ports: {80: permissive}}\n"},
	{name: "modes: a workload without its namespace", text: "modes:\n- {name: a, workload: web, mode: permissive}\n"},
	{name: "modes: a namespace with a star", text: "modes:\n- {name: a, namespace: \"*\", mode: permissive}\n"},
	{name: "modes: an empty namespace", text: "modes:\n- {name: a, namespace: \"\", mode: permissive}\n"},
	{name: "modes: ports of a namespace", text: "modes:\n- {name: a, namespace: demo, ports: {80: permissive}}\n"},
	{name: "modes: port 0", text: "modes:\n- {name: a, namespace: demo, workload: web, ports: {0: permissive}}\n"},
	{name: "modes: port 70000", text: "modes:\n- {name: a, namespace: demo, workload: web, ports: {70000: permissive}}\n"},
	{name: "modes: a port that is a name", text: "modes:\n- {name: a, namespace: demo, workload: web, ports: {http: permissive}}\n"},
	{name: "modes: a port that is a range", text: "modes:\n- {name: a, namespace: demo, workload: web, ports: {80-90: permissive}}\n"},
	{name: "modes: a port twice", text: "modes:\n- {name: a, namespace: demo, workload: web, ports: {80: permissive, 80: strict}}\n"},
	{name: "modes: a port's mode", text: "modes:\n- {name: a, namespace: demo, workload: web, ports: {80: off}}\n"},
	{name: "modes: no port", text: "modes:\n- {name: a, namespace: demo, workload: web, ports: {}}\n"},
	{name: "modes: a list of ports", text: "modes:\n- {name: a, namespace: demo, workload: web, ports: [80, 90]}\n"},
	{name: "modes: a mapping for the list", text: "modes: {demo: permissive}\n"},
}
