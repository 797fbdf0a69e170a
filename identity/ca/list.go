// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"cmp"
	"crypto/x509"
	"maps"
	"path/filepath"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
)

// Certificates returns those that are in use, without a key: the roots of all
// trust domains, the intermediate, and the leaves by their identities.
func (a *Authority) Certificates() identity.Certificates {
	a.mu.Lock()
	out := identity.Certificates{Roots: map[spiffeid.TrustDomain][]*x509.Certificate{}, Intermediates: []*x509.Certificate{a.files.intermediate.cert}}
	for td, b := range a.bundles {
		out.Roots[td] = b.X509Authorities()
	}
	entries := slices.Collect(maps.Values(a.svids))
	a.mu.Unlock()
	for _, e := range entries {
		e.mu.Lock()
		if e.svid != nil {
			out.Leaves = append(out.Leaves, e.svid.Leaf())
		}
		e.mu.Unlock()
	}
	slices.SortFunc(out.Leaves, func(x, y *x509.Certificate) int { return cmp.Compare(x.URIs[0].String(), y.URIs[0].String()) })
	return out
}

// Last returns the SVID that was issued last for an identity, which may have ended;
// nil: none is remembered.
func (a *Authority) Last(id spiffeid.ID) *identity.SVID {
	a.mu.Lock()
	e := a.svids[id]
	a.mu.Unlock()
	if e == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.svid
}

// Folder is what an authority's folder holds, whether it can be used or not.
type Folder struct {
	identity.Certificates
	Domain                   spiffeid.TrustDomain // of the first root that says so; else zero
	RootKey, IntermediateKey bool                 // there is a file
}

// Inspect reads the certificates of a folder. Keys are not read.
func Inspect(dir string) (*Folder, error) {
	f := &Folder{}
	roots, err := readRoots(dir)
	if err != nil {
		return nil, err
	}
	for _, c := range roots {
		if len(c.URIs) == 0 || !f.Domain.IsZero() {
			continue
		}
		if td, err := spiffeid.TrustDomainFromURI(c.URIs[0]); err == nil {
			f.Domain = td
		}
	}
	f.Roots = map[spiffeid.TrustDomain][]*x509.Certificate{f.Domain: roots}
	f.Intermediates, err = readCerts(filepath.Join(dir, intermediateCert), mendIntermediate)
	if err != nil && !missing(err) {
		return nil, err
	}
	if f.RootKey, err = exists(filepath.Join(dir, rootKey)); err != nil {
		return nil, err
	}
	f.IntermediateKey, err = exists(filepath.Join(dir, intermediateKey))
	return f, err
}
