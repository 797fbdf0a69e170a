// SPDX-License-Identifier: Apache-2.0

package strict

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// This file has the values that several files of the operator share.

const (
	nameAllowed        = "a Kubernetes name: lower-case letters, digits, - and ., at most 253 of them"
	trustDomainAllowed = "a SPIFFE trust domain in lower case, such as cluster.local"
	idAllowed          = "a SPIFFE ID, such as spiffe://cluster.local/ns/demo/sa/web"
	addressAllowed     = "an IP address, such as 10.0.0.7 or fd00::7"
	uidAllowed         = "letters, digits, -, _, . and :, at most 128 of them"
)

// maxName is the longest name in characters (RFC 1123 subdomain, as in Kubernetes).
const maxName = 253

// maxUID is the longest UID in characters; Kubernetes has 36.
const maxUID = 128

// parseName takes a name as Kubernetes would. Such a name is also safe in a
// SPIFFE path and in a file name.
func parseName(text string) (string, error) {
	if text == "" {
		return "", errors.New("is empty")
	}
	good := len(text) <= maxName
	edge := true // at the beginning, or behind a dot
	for i := 0; i < len(text) && good; i++ {
		c := text[i]
		alnum := 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
		good = alnum || !edge && (c == '-' || c == '.' && text[i-1] != '-')
		edge = c == '.'
	}
	last := text[len(text)-1]
	if !good || last == '-' || last == '.' {
		return "", fmt.Errorf("%q is not valid", text)
	}
	return text, nil
}

// Name reads a Kubernetes name.
func (o *Object) Name(name string, dst *string) {
	n, ok := o.fields[name]
	if ok && kind(n.value) != "text" {
		o.String(name, dst, nameAllowed) // says to quote a number
		return
	}
	Scalar(o, name, dst, nameAllowed, parseName)
}

// RequireName reads a Kubernetes name that must be there.
func (o *Object) RequireName(name string, dst *string) {
	o.Require(name, nameAllowed)
	o.Name(name, dst)
}

// UID reads an identifier of no further meaning.
func (o *Object) UID(name string, dst *string) {
	Scalar(o, name, dst, uidAllowed, func(text string) (string, error) {
		if text == "" || len(text) > maxUID {
			return "", fmt.Errorf("is %d characters long", len(text))
		}
		for _, c := range text {
			alnum := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
			if !alnum && !strings.ContainsRune("-_.:", c) {
				return "", fmt.Errorf("%q is not valid", text)
			}
		}
		return text, nil
	})
}

// TrustDomain reads a bare trust domain, not an ID of it.
func (o *Object) TrustDomain(name string, dst *spiffeid.TrustDomain) {
	Scalar(o, name, dst, trustDomainAllowed, func(text string) (spiffeid.TrustDomain, error) {
		td, err := spiffeid.TrustDomainFromString(text)
		if err != nil || td.Name() != text {
			return spiffeid.TrustDomain{}, fmt.Errorf("%q is not valid", text)
		}
		return td, nil
	})
}

// IDs reads a list of SPIFFE IDs.
func (o *Object) IDs(name string, dst *[]spiffeid.ID) {
	List(o, name, dst, idAllowed, func(text string) (spiffeid.ID, error) {
		id, err := spiffeid.FromString(text)
		if err != nil {
			return id, fmt.Errorf("%q is not valid: %w", text, err)
		}
		return id, nil
	})
}

// Addresses reads a list of unicast addresses. seen, which may be nil, is asked
// about each, and its error is the mistake.
func (o *Object) Addresses(name string, dst *[]netip.Addr, seen func(netip.Addr) error) {
	List(o, name, dst, addressAllowed, func(text string) (netip.Addr, error) {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return a, fmt.Errorf("%q is not valid", text)
		}
		if a.Is4In6() {
			return a, fmt.Errorf("%s is an IPv4 address in IPv6 clothes; write it as IPv4", text)
		}
		if problem := addressProblem(a); problem != "" {
			return a, &Unfit{text + " " + problem, "an address that other nodes reach, such as 10.0.0.7 or fd00::7"}
		}
		if seen != nil {
			err = seen(a)
		}
		return a, err
	})
}

// addressProblem says why an address cannot be a pod's.
func addressProblem(a netip.Addr) string {
	switch {
	case a.Zone() != "":
		return "has a zone"
	case a.IsUnspecified(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "is nobody's address"
	case a.IsLoopback():
		return "is a loopback address"
	case a.IsMulticast():
		return "is a multicast address"
	case a.IsLinkLocalUnicast():
		return "is a link-local address"
	}
	return ""
}
