// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// soonAtMost bounds how long before its end a certificate counts as ending soon:
// in the last quarter of its life, when whatever renews it at the half has not.
const soonAtMost = 90 * 24 * time.Hour

// Tree is a certificate with those that it has signed, as it is shown to people.
// It has no key.
type Tree struct {
	Kind      string    `json:"kind"` // root, intermediate, leaf
	Name      string    `json:"name"` // of a leaf its SPIFFE ID, of the others the subject
	Domain    string    `json:"trustDomain,omitempty"`
	Serial    string    `json:"serial"` // as a deny list takes it
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
	Problems  []string  `json:"problems,omitempty"`
	Signed    []*Tree   `json:"signed,omitempty"`

	cert *x509.Certificate
}

// Certificates are what trees are made of.
type Certificates struct {
	Roots         map[spiffeid.TrustDomain][]*x509.Certificate
	Intermediates []*x509.Certificate
	Leaves        []*x509.Certificate
}

// Trees puts certificates below those that have signed them, roots first, each
// with what is wrong with it: expired, ends soon, not yet valid, its issuer is not
// known, denied. What no known certificate has signed is at the top. denied is as
// in a Verifier.
func Trees(all Certificates, now time.Time, denied func(*x509.Certificate, spiffeid.ID) (string, bool)) []*Tree {
	var top, signers []*Tree
	node := func(kind string, c *x509.Certificate, td spiffeid.TrustDomain) *Tree {
		t := &Tree{Kind: kind, Name: c.Subject.CommonName, Domain: td.Name(), Serial: c.SerialNumber.Text(16), NotBefore: c.NotBefore, NotAfter: c.NotAfter, cert: c}
		var id spiffeid.ID
		if len(c.URIs) > 0 {
			id, _ = spiffeid.FromURI(c.URIs[0])
			t.Domain = id.TrustDomain().Name()
		}
		if kind == "leaf" {
			t.Name = id.String()
		}
		if t.Name == "" {
			t.Name = c.Subject.String()
		}
		switch soon := c.NotAfter.Add(-min(c.NotAfter.Sub(c.NotBefore)/4, soonAtMost)); {
		case now.Before(c.NotBefore):
			t.Problems = append(t.Problems, "not yet valid: look at the clock")
		case now.After(c.NotAfter):
			t.Problems = append(t.Problems, "expired")
		case now.After(soon):
			t.Problems = append(t.Problems, "ends soon, and was not renewed")
		}
		if denied != nil {
			if why, is := denied(c, id); is {
				t.Problems = append(t.Problems, "denied: "+why)
			}
		}
		return t
	}
	place := func(t *Tree) {
		for _, by := range signers {
			// The names first: a signature costs some 100 us.
			if by != t && bytes.Equal(t.cert.RawIssuer, by.cert.RawSubject) && t.cert.CheckSignatureFrom(by.cert) == nil {
				by.Signed = append(by.Signed, t)
				return
			}
		}
		t.Problems = append(t.Problems, fmt.Sprintf("its issuer is not known: %s", t.cert.Issuer))
		top = append(top, t)
	}
	for _, td := range slices.SortedFunc(maps.Keys(all.Roots), spiffeid.TrustDomain.Compare) {
		for _, c := range all.Roots[td] {
			signers = append(signers, node("root", c, td))
		}
	}
	top = append(top, signers...)
	var below []*Tree
	for _, c := range all.Intermediates {
		below = append(below, node("intermediate", c, spiffeid.TrustDomain{}))
	}
	signers = append(signers, below...)
	for _, c := range all.Leaves {
		below = append(below, node("leaf", c, spiffeid.TrustDomain{}))
	}
	for _, t := range below {
		place(t)
	}
	return top
}
