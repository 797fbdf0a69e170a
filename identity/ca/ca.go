// SPDX-License-Identifier: Apache-2.0

// Package ca is the embedded authority: root, intermediate, leaf, from files,
// with nothing else running. A single node makes its own on first start;
// several nodes of one mesh share a root, and each is given an intermediate of
// its own (NewIntermediate). The root's key may be taken away afterwards.
//
// Leaf keys are made here, stay in memory and are never written. CA keys are
// files of mode 0600 in a directory of mode 0700. An Authority holds no
// descriptor; Run renews what is used until its context ends.
package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
)

// Config has what an Authority needs. Dir and TrustDomain are required.
type Config struct {
	Dir         string
	TrustDomain spiffeid.TrustDomain
	LeafTTL     time.Duration // 0: 24 h
	// ExtraRoots are further roots, of this trust domain or of others.
	ExtraRoots map[spiffeid.TrustDomain][]*x509.Certificate
	Logger     *slog.Logger     // hears of renewals that fail; nil: nobody does
	Now        func() time.Time // nil: the clock
}

// Authority issues SVIDs of one trust domain. It is an identity.Source.
type Authority struct {
	cfg          Config
	intermediate *x509.Certificate
	key          crypto.Signer
	bundles      map[spiffeid.TrustDomain]*x509bundle.Bundle

	mu      sync.Mutex // guards the fields below
	svids   map[spiffeid.ID]*entry
	changed chan struct{}
}

// entry is one identity's SVID.
type entry struct {
	mu    sync.Mutex // held while it is issued, so that concurrent calls share one
	svid  *identity.SVID
	renew time.Time
}

// retryEvery is how long after a failed renewal the next one is tried, and how
// often Run looks.
const retryEvery = time.Minute

// Open opens the authority in cfg.Dir, and makes one there when the directory
// is empty or missing.
func Open(_ context.Context, cfg Config) (*Authority, error) {
	if cfg.LeafTTL == 0 {
		cfg.LeafTTL = 24 * time.Hour
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	rootFile := filepath.Join(cfg.Dir, rootCert)
	there, err := exists(rootFile)
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if !there {
		for _, f := range []string{rootKey, intermediateCert, intermediateKey} {
			if half, _ := exists(filepath.Join(cfg.Dir, f)); half {
				return nil, fmt.Errorf("open CA: %s is there but %s is missing: put it back, or empty the directory to begin anew", filepath.Join(cfg.Dir, f), rootFile)
			}
		}
		if err := Init(cfg.Dir, cfg.TrustDomain, cfg.Now()); err != nil {
			return nil, fmt.Errorf("open CA: %w", err)
		}
		cfg.Logger.Info("made a certificate authority", "dir", cfg.Dir, "trust_domain", cfg.TrustDomain.Name())
	}
	return load(cfg)
}

func load(cfg Config) (*Authority, error) {
	if err := checkDir(cfg.Dir); err != nil {
		return nil, err
	}
	roots, err := readCerts(filepath.Join(cfg.Dir, rootCert))
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	cert, key, err := readPair(cfg.Dir, intermediateCert, intermediateKey)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open CA: %w: give this node an intermediate with `ztunnel ca intermediate`", err)
	}
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	a := &Authority{
		cfg: cfg, intermediate: cert, key: key,
		bundles: map[spiffeid.TrustDomain]*x509bundle.Bundle{},
		svids:   map[spiffeid.ID]*entry{},
		changed: make(chan struct{}),
	}
	if err := checkIntermediate(cfg, cert, roots); err != nil {
		return nil, fmt.Errorf("open CA: %s: %w", filepath.Join(cfg.Dir, intermediateCert), err)
	}
	a.bundles[cfg.TrustDomain] = x509bundle.FromX509Authorities(cfg.TrustDomain, roots)
	for td, extra := range cfg.ExtraRoots {
		if a.bundles[td] == nil {
			a.bundles[td] = x509bundle.New(td)
		}
		for _, r := range extra {
			a.bundles[td].AddX509Authority(r)
		}
	}
	return a, nil
}

// checkIntermediate refuses one that would sign what no peer takes.
func checkIntermediate(cfg Config, c *x509.Certificate, roots []*x509.Certificate) error {
	if !c.IsCA {
		return errors.New("it is no CA certificate")
	}
	if now := cfg.Now(); now.After(c.NotAfter) {
		return fmt.Errorf("it has expired at %s: make a new one with `ztunnel ca intermediate`", c.NotAfter.UTC().Format(time.RFC3339))
	}
	pool := x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	if _, err := c.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: cfg.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return fmt.Errorf("it does not chain to %s: %w", filepath.Join(cfg.Dir, rootCert), err)
	}
	if len(c.URIs) == 1 {
		if td, err := spiffeid.TrustDomainFromURI(c.URIs[0]); err == nil && td != cfg.TrustDomain {
			return fmt.Errorf("it is of trust domain %s, the configuration says %s", td, cfg.TrustDomain)
		}
	}
	return nil
}

// Bundle is identity.BundleSource's.
func (a *Authority) Bundle(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if b := a.bundles[td]; b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("%w: %s", identity.ErrUnknownTrustDomain, td)
}

// Changed is identity.Source's.
func (a *Authority) Changed() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

func (a *Authority) announce() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.changed)
	a.changed = make(chan struct{})
}

// SVID is identity.Source's. It issues at the first call for an identity, and
// renews one that has passed half its life; when that fails, the valid one is
// returned.
func (a *Authority) SVID(_ context.Context, id spiffeid.ID) (*identity.SVID, error) {
	if id.TrustDomain() != a.cfg.TrustDomain {
		return nil, fmt.Errorf("issue %s: this authority is of trust domain %s", id, a.cfg.TrustDomain)
	}
	a.mu.Lock()
	e := a.svids[id]
	if e == nil {
		e = &entry{}
		a.svids[id] = e
	}
	a.mu.Unlock()
	return a.current(e, id)
}

func (a *Authority) current(e *entry, id spiffeid.ID) (*identity.SVID, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := a.cfg.Now()
	if e.svid != nil && now.Before(e.renew) {
		return e.svid, nil
	}
	s, err := a.issue(id, now)
	if err != nil {
		if e.svid != nil && now.Before(e.svid.Leaf().NotAfter) {
			e.renew = now.Add(retryEvery)
			a.cfg.Logger.Warn("renew certificate", "identity", id.String(), "err", err, "valid_until", e.svid.Leaf().NotAfter)
			return e.svid, nil
		}
		return nil, err
	}
	first := e.svid == nil
	e.svid = s
	e.renew = renewAt(now, s.Leaf().NotAfter)
	if !first {
		a.announce()
	}
	return s, nil
}

// renewAt is half the life, a tenth of it earlier or later, so that what was
// issued together is not renewed together.
func renewAt(now, end time.Time) time.Time {
	life := end.Sub(now)
	return now.Add(time.Duration(float64(life) * (0.45 + 0.1*rand.Float64())))
}

func (a *Authority) issue(id spiffeid.ID, now time.Time) (*identity.SVID, error) {
	if !now.Before(a.intermediate.NotAfter) {
		return nil, fmt.Errorf("issue %s: the intermediate has expired at %s: make a new one with `ztunnel ca intermediate`", id, a.intermediate.NotAfter.UTC().Format(time.RFC3339))
	}
	key, err := newKey()
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	leaf, err := sign(&x509.Certificate{
		NotBefore:             now.Add(-backdate),
		NotAfter:              earlier(now.Add(a.cfg.LeafTTL), a.intermediate.NotAfter),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.URL()},
	}, a.intermediate, key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	return &identity.SVID{ID: id, Certificates: []*x509.Certificate{leaf, a.intermediate}, Key: key}, nil
}

// Run renews the SVIDs that have been asked for before they expire, until ctx
// ends.
func (a *Authority) Run(ctx context.Context) {
	tick := time.NewTicker(min(retryEvery, max(a.cfg.LeafTTL/20, time.Second)))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		a.mu.Lock()
		due := make(map[spiffeid.ID]*entry, len(a.svids))
		for id, e := range a.svids {
			due[id] = e
		}
		a.mu.Unlock()
		for id, e := range due {
			if _, err := a.current(e, id); err != nil {
				a.cfg.Logger.Error("renew certificate", "identity", id.String(), "err", err)
			}
		}
	}
}
