// SPDX-License-Identifier: Apache-2.0

// Package static takes the pods of a node from a file, which Watch watches.
// Nothing needs closing.
package static

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config/strict"
	"github.com/culvert-mesh/culvert/config/watch"
	"github.com/culvert-mesh/culvert/pod"
)

// Source is a pod.Source over a file.
type Source struct {
	file        *watch.File
	trustDomain spiffeid.TrustDomain

	loading sync.Mutex // orders reloads

	mu      sync.Mutex
	pods    []pod.Pod     // guarded by mu
	changed chan struct{} // guarded by mu
}

// Open reads the file. trustDomain is that of pods which name none.
func Open(path string, trustDomain spiffeid.TrustDomain) (*Source, error) {
	s := &Source{file: watch.New(path), trustDomain: trustDomain, changed: make(chan struct{})}
	if err := s.Reload(); err != nil {
		return nil, err
	}
	return s, nil
}

// Reload reads the file now. On an error the pods stay as they were.
func (s *Source) Reload() error {
	s.loading.Lock()
	defer s.loading.Unlock()
	data, err := s.file.Read()
	return s.take(data, err)
}

// Watch reloads when the file has changed, until ctx ends, and calls report
// after each time that it did.
func (s *Source) Watch(ctx context.Context, report func(error)) {
	watch.Run(ctx, func() {
		s.loading.Lock()
		data, changed, err := s.file.Changed()
		if changed {
			err = s.take(data, err)
		}
		s.loading.Unlock()
		if changed {
			report(err)
		}
	})
}

func (s *Source) take(data []byte, err error) error {
	if err != nil {
		return err
	}
	pods, err := ParseFile(s.file.Path(), data, s.trustDomain)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pods = pods
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

// Pods returns the pods that were read last.
func (s *Source) Pods(context.Context) ([]pod.Pod, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pods := slices.Clone(s.pods)
	for i := range pods {
		pods[i].Addresses = slices.Clone(pods[i].Addresses)
	}
	return pods, nil
}

// Changed returns a channel that is closed at the next reload.
func (s *Source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// ParseFile reads data as the file at path:
//
//	pods:
//	  - name: web                  # needed
//	    namespace: demo            # default: default
//	    serviceAccount: web        # default: default
//	    netns: /run/netns/web      # needed: the pod's network namespace
//	    addresses: [10.0.1.7, fd00:1::7]   # one, or one of each family
//	    trustDomain: cluster.local # the mesh's own, which is the default; no other
//	    uid: 3b0c…                 # default: none
//
// A mistake is a *strict.Error.
func ParseFile(path string, data []byte, trustDomain spiffeid.TrustDomain) ([]pod.Pod, error) {
	r := reader{
		trustDomain: trustDomain,
		keys:        map[string]int{},
		netns:       map[string]int{},
		addrs:       map[netip.Addr]string{},
	}
	err := strict.Read(path, data, func(o *strict.Object) {
		o.Objects("pods", r.read)
	})
	if err != nil {
		return nil, err
	}
	return r.list, nil
}

type reader struct {
	trustDomain spiffeid.TrustDomain
	list        []pod.Pod
	keys, netns map[string]int        // the line of each
	addrs       map[netip.Addr]string // the owner of each
}

func (r *reader) read(o *strict.Object) {
	const netnsAllowed = "the absolute path of a network namespace, such as /run/netns/web"
	const addressesAllowed = "one IP address, or one IPv4 and one IPv6 address"
	p := pod.Pod{Namespace: "default", ServiceAccount: "default"}
	td := r.trustDomain

	o.RequireName("name", &p.Name)
	o.Name("namespace", &p.Namespace)
	o.Name("serviceAccount", &p.ServiceAccount)
	o.TrustDomain("trustDomain", &td)
	o.UID("uid", &p.UID)
	p.TrustDomain = td.Name()
	if td != r.trustDomain {
		o.Fail("trustDomain", r.trustDomain.Name()+", the mesh's own", "%q is another trust domain, for which this node has no authority", td.Name())
	}
	if line, twice := r.keys[p.Key()]; twice {
		o.Fail("name", "each name once in a namespace", "%s/%s is also that of line %d", p.Namespace, p.Name, line)
	}
	r.keys[p.Key()] = o.Line("")

	o.Require("netns", netnsAllowed)
	strict.Scalar(o, "netns", &p.NetnsPath, netnsAllowed, func(text string) (string, error) {
		if !filepath.IsAbs(text) {
			return "", fmt.Errorf("%q is not valid", text)
		}
		text = filepath.Clean(text)
		if line, twice := r.netns[text]; twice {
			return "", &strict.Unfit{Problem: fmt.Sprintf("%s is also the namespace of line %d", text, line), Allowed: "a namespace that no other pod has"}
		}
		r.netns[text] = o.Line("netns")
		return text, nil
	})

	o.RequireList("addresses", addressesAllowed)
	var v4, v6 bool
	o.Addresses("addresses", &p.Addresses, func(a netip.Addr) error {
		if owner, twice := r.addrs[a]; twice {
			return &strict.Unfit{Problem: fmt.Sprintf("%s is also an address of %s", a, owner), Allowed: "an address that no other pod has"}
		}
		r.addrs[a] = p.Namespace + "/" + p.Name
		family, name := &v6, "IPv6"
		if a.Is4() {
			family, name = &v4, "IPv4"
		}
		if *family {
			return &strict.Unfit{Problem: fmt.Sprintf("%s is the pod's second %s address", a, name), Allowed: "the primary one only, beside one of the other family"}
		}
		*family = true
		return nil
	})
	r.list = append(r.list, p)
}
