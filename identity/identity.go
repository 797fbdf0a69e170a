// SPDX-License-Identifier: Apache-2.0

// Package identity has the values of workload identity and the check of a
// peer's: SVIDs (X.509 certificates with a SPIFFE ID), the bundles they chain
// to, and the reasons for which a handshake fails. Where certificates come from
// is a Source; each issuer has a folder of its own below this one, ca the first.
//
// The package makes no handshake and reads no file. Private keys are
// crypto.Signers: nothing here needs to see them.
package identity

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SVID is a workload's certificate with its chain and its key.
type SVID struct {
	ID           spiffeid.ID
	Certificates []*x509.Certificate // leaf first, then intermediates; the root is left out
	Key          crypto.Signer
}

// Leaf is the workload's own certificate.
func (s *SVID) Leaf() *x509.Certificate { return s.Certificates[0] }

// ErrUnknownTrustDomain is returned by Source.Bundle for a trust domain that
// has no bundle.
var ErrUnknownTrustDomain = errors.New("no bundle for this trust domain")

// Source gives SVIDs and bundles. Its methods may be called from any goroutine.
type Source interface {
	// SVID returns the current SVID of a workload of this node, and gets or
	// renews it where that is due. Concurrent calls for one identity share
	// one issuance. The SVID is not to be changed.
	SVID(ctx context.Context, id spiffeid.ID) (*SVID, error)
	BundleSource
	// Changed returns a channel that is closed at the next change of an
	// SVID or a bundle. To miss none, take it before asking.
	Changed() <-chan struct{}
}

// BundleSource gives the roots of trust domains.
type BundleSource interface {
	// Bundle returns a trust domain's roots, or an error that is
	// ErrUnknownTrustDomain. The bundle is not to be changed.
	Bundle(td spiffeid.TrustDomain) (*x509bundle.Bundle, error)
}

// Peer is who a handshake's other side has proven to be. It is true only once
// the handshake has ended: certificates are checked before the peer has shown
// that it holds their key.
type Peer struct {
	ID          spiffeid.ID
	Certificate *x509.Certificate // the leaf
	// Path is what it chains by, from the leaf to a root of its trust domain, so
	// that a revocation can be applied to what is open already.
	Path   []*x509.Certificate
	Expiry time.Time // when the first certificate of its chain ends, most often the leaf
}

// Reason says why a handshake failed: a closed list, used by log, metric and
// trace.
type Reason string

// The reasons, in the order in which they are looked at: the first that holds
// is the one that is named.
const (
	ReasonTimeout                Reason = "timeout"                   // not finished in time
	ReasonTLSProtocol            Reason = "tls_protocol"              // not TLS 1.3 with ALPN h2, or broken
	ReasonNoCertificate          Reason = "no_certificate"            // the peer sent none
	ReasonSVIDMalformed          Reason = "svid_malformed"            // not an X.509-SVID's leaf
	ReasonCertificateNotYetValid Reason = "certificate_not_yet_valid" // its time has not come
	ReasonCertificateExpired     Reason = "certificate_expired"       // its time is over
	ReasonTrustDomainUnknown     Reason = "trust_domain_unknown"      // no bundle for it
	ReasonChainValidationFailed  Reason = "chain_validation_failed"   // does not chain to its bundle
	ReasonRevoked                Reason = "revoked"                   // on the deny list
	ReasonIdentityMismatch       Reason = "identity_mismatch"         // somebody else than the workload's
	ReasonRefusedByPeer          Reason = "refused_by_peer"           // the peer refused ours
)

// Reasons returns the closed list in its order.
func Reasons() []Reason {
	return []Reason{
		ReasonTimeout, ReasonTLSProtocol, ReasonNoCertificate, ReasonSVIDMalformed,
		ReasonCertificateNotYetValid, ReasonCertificateExpired, ReasonTrustDomainUnknown,
		ReasonChainValidationFailed, ReasonRevoked, ReasonIdentityMismatch, ReasonRefusedByPeer,
	}
}

// Failure is a handshake's failure with its reason. Detail is for people and
// names the certificate at fault.
type Failure struct {
	Reason  Reason
	Detail  string
	Claimed string // the URI of the peer's certificate, which proves nothing; empty: there is none
	Err     error  // what it came from; may be nil
}

// Error is error's.
func (f *Failure) Error() string { return string(f.Reason) + ": " + f.Detail }

// Unwrap is errors'.
func (f *Failure) Unwrap() error { return f.Err }
