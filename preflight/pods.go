// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"fmt"
	"slices"
	"strings"

	"github.com/culvert-mesh/culvert/internal/input"
	"github.com/culvert-mesh/culvert/internal/netns"
	"github.com/culvert-mesh/culvert/pod"
	"github.com/culvert-mesh/culvert/pod/static"
	"github.com/culvert-mesh/culvert/redirect"
	"github.com/culvert-mesh/culvert/redirect/sockdiag"
)

func podChecks() []Check {
	return []Check{
		{
			Name: "pods", run: pods, after: []string{"configuration", "network namespaces", "cgroup"},
			Why:     "each pod of the pods file can be enrolled: its namespace, lo and addresses are there, its processes live below the cgroup, the tunnel's ports are free in it",
			Without: "it is not enrolled, and tried again",
			Mend:    "correct its entry, or bring its namespace in order",
		},
		{
			Name: "other meshes", run: otherMeshes, after: []string{"configuration", "network namespaces"},
			Why:     "the rules of another mesh in a pod take its connections first",
			Without: "its connections are redirected to another proxy, or lost",
			Mend:    "take the pod out of the other mesh, and make it anew",
		},
	}
}

// ownPorts are the tunnel's in every enrolled pod (bpf/culvert.h).
var ownPorts = []uint16{15001, 15006, 15008}

// eachPod calls f for the pods of the pods file whose namespaces can be opened,
// and unopened, which may be nil, for the others. It returns how many there are.
func (l *look) eachPod(f func(pod.Pod, *netns.NS), unopened func(pod.Pod, error)) (int, error) {
	data, err := input.Read(l.Config.Pods.File, input.Max)
	if err != nil {
		return 0, err
	}
	list, err := static.ParseFile(l.Config.Pods.File, data, l.Config.TrustDomain)
	if err != nil {
		return 0, err
	}
	for _, p := range list {
		if l.ctx.Err() != nil {
			return 0, l.ctx.Err()
		}
		ns, err := netns.Open(p.NetnsPath)
		if err != nil {
			if unopened != nil {
				unopened(p, err)
			}
			continue
		}
		f(p, ns)
		ns.Close()
	}
	return len(list), nil
}

func pods(l *look) {
	_, path, err := redirect.FindCgroup(l.Config.Cgroup)
	if err != nil {
		l.failed(err)
		return
	}
	before := len(l.found)
	n, err := l.eachPod(func(p pod.Pod, ns *netns.NS) { l.pod(p, ns, path) }, func(p pod.Pod, err error) { l.fail("%s: %v", p.Key(), err) })
	switch {
	case err != nil:
		l.failed(err)
	case n == 0:
		l.warn("none is listed: nothing is carried").mend("list this node's pods in %s", l.Config.Pods.File)
	case len(l.found) == before:
		l.ok("all of %d can be enrolled", n)
	}
}

func (l *look) pod(p pod.Pod, ns *netns.NS, cgroup string) {
	foreign, enrolled, err := redirect.LookupPrograms(ns)
	switch {
	case err != nil:
		l.fail("%s: %v", p.Key(), err)
	case len(foreign) > 0:
		l.warn("%s: %s chooses listeners in its namespace too", p.Key(), strings.Join(foreign, ", ")).
			mend("see that it leaves the ports 15001, 15006 and 15008, and the mesh's addresses, alone")
	}
	if steered, err := redirect.Fit(ns, p.Addresses); err != nil {
		l.fail("%s: %v", p.Key(), err)
	} else if len(steered) < len(p.Addresses) {
		l.warn("%s: IPv6 is switched off in its namespace: only its IPv4 address is carried", p.Key()).
			mend("set net.ipv6.conf.all.disable_ipv6=0 in it, or leave its IPv6 address out")
	}
	if out, err := redirect.Outsiders(cgroup, ns); err != nil {
		l.fail("%s: look for its processes: %v", p.Key(), err)
	} else if len(out) > 0 {
		l.fail("%s: processes of it live outside the cgroup: %s", p.Key(), strings.Join(out, ", ")).
			mend(`set cgroup to one that holds them, or to "" for the root`)
	}
	if enrolled {
		return // the ports are the tunnel's
	}
	sockets, err := sockdiag.List(ns, sockdiag.Listening)
	if err != nil {
		return // the check of socket diagnosis says so
	}
	for _, port := range ownPorts {
		if at := slices.IndexFunc(sockets, func(s sockdiag.Socket) bool { return s.Local.Port() == port }); at >= 0 {
			l.fail("%s: a process of user %d listens on port %d, which is the tunnel's", p.Key(), sockets[at].UID, port).
				mend("have it listen elsewhere; where it is another mesh's proxy, take the pod out of that")
		}
	}
}

func otherMeshes(l *look) {
	before := len(l.found)
	n, err := l.eachPod(func(p pod.Pod, ns *netns.NS) {
		var found []string
		if err := ns.Do(func() (err error) { found, err = rulesOf(l.facts.rules); return err }); err != nil {
			l.warn("%s: look at its rules: %v", p.Key(), err).mend("look at them by hand: `nsenter --net=%s nft list ruleset`", p.NetnsPath)
			return
		}
		for _, m := range meshes {
			var of []string
			for _, rule := range found {
				if m.owns(rule) {
					of = append(of, rule)
				}
			}
			if len(of) > 0 {
				slices.Sort(of)
				l.fail("%s: %s has rules in it: %s", p.Key(), m.name, strings.Join(slices.Compact(of), ", ")).mend("%s", m.mend)
			}
		}
	}, nil)
	switch {
	case err != nil:
		l.failed(err)
	case len(l.found) == before:
		l.ok("none in %s", plural(n, "pod"))
	}
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
