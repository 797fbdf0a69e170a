// SPDX-License-Identifier: Apache-2.0

// Package ca is the embedded authority: root, intermediate, leaf, from files,
// with nothing else running. A single node makes its own on first start;
// several nodes of one mesh share a root, and each is given an intermediate of
// its own (NewIntermediate). The root's key may be taken away afterwards: then
// somebody has to bring a new intermediate before the old one ends, which is a
// year, and while the key is there an Authority makes it itself.
//
// Leaf keys are made here, stay in memory and are never written. CA keys are
// files of mode 0600 in a directory of mode 0700; what is written appears whole
// or not at all. An Authority holds no descriptor and starts no goroutine; Run
// renews what is used, and takes up files that have changed, until its context
// ends.
package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity"
	"github.com/culvert-mesh/culvert/internal/input"
)

// DefaultLeafTTL is how long a leaf lives, as with Istio. It is renewed at half
// of that.
const DefaultLeafTTL = 24 * time.Hour

// retryEvery is how long after a failed renewal the next one is tried, and the
// longest between two looks of Run.
const retryEvery = time.Minute

// Config has what an Authority needs. Dir and TrustDomain are required.
type Config struct {
	Dir         string
	TrustDomain spiffeid.TrustDomain
	LeafTTL     time.Duration // 0: DefaultLeafTTL
	// ExtraRoots are further roots, of this trust domain or of others.
	ExtraRoots map[spiffeid.TrustDomain][]*x509.Certificate
	Logger     *slog.Logger // hears of renewals, and of those that fail; nil: nobody does
	// Report hears of files that Run reads again: nil where changed
	// ones were taken up or what was wrong is mended, else, once, why the earlier
	// ones stay in use. Nil: the Logger hears of the error.
	Report func(error)
	Now    func() time.Time // nil: the clock
}

// Authority issues SVIDs of one trust domain. It is an identity.Source.
type Authority struct {
	cfg Config

	loading sync.Mutex // orders reloads

	mu      sync.Mutex // guards the fields below
	files   files
	extra   map[spiffeid.TrustDomain][]*x509.Certificate // not changed, replaced
	bundles map[spiffeid.TrustDomain]*x509bundle.Bundle  // replaced as a whole
	svids   map[spiffeid.ID]*entry
	changed chan struct{}
	said    string // what has last been logged about the files
	failed  string // why they could not be read again; empty: they were
}

// files is what the directory holds, without the root's key.
type files struct {
	roots        []*x509.Certificate
	intermediate pair
	warning      string // what an operator should do before long; most often empty
}

// entry is one identity's SVID.
type entry struct {
	mu    sync.Mutex // guards svid and renew; held while it is issued, so that concurrent calls share one
	svid  *identity.SVID
	renew time.Time

	asked time.Time // when SVID was last called for it; guarded by Authority.mu
}

// Open opens the authority in cfg.Dir. Where the directory is empty or missing
// it makes a root and an intermediate; where there is a root with its key, a
// missing intermediate, and one that has lived half its life, is made anew. It
// refuses files that others can read or that do not belong together: the error
// names the file and the mend.
func Open(_ context.Context, cfg Config) (*Authority, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("open CA: no trust domain is given")
	}
	if cfg.LeafTTL < 0 {
		return nil, fmt.Errorf("open CA: leaves cannot live for %s", cfg.LeafTTL)
	}
	if cfg.LeafTTL == 0 {
		cfg.LeafTTL = DefaultLeafTTL
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := first(cfg); err != nil {
		return nil, err
	}
	f, err := load(cfg, atStart)
	if err != nil {
		return nil, err
	}
	a := &Authority{
		cfg: cfg, files: f, extra: cfg.ExtraRoots, bundles: bundles(cfg.TrustDomain, f.roots, cfg.ExtraRoots),
		svids: map[spiffeid.ID]*entry{}, changed: make(chan struct{}),
	}
	a.say(f.warning)
	return a, nil
}

// first makes an authority where there is none.
func first(cfg Config) error {
	if there, err := begun(cfg); err != nil || there {
		return err
	}
	if err := Init(cfg.Dir, cfg.TrustDomain, cfg.Now()); err != nil {
		return err
	}
	cfg.Logger.Info("made a certificate authority", "dir", cfg.Dir, "trust_domain", cfg.TrustDomain.Name())
	return nil
}

// begun says whether there is a root; one that is missing beside the other files
// is an error.
func begun(cfg Config) (bool, error) {
	if there, err := exists(cfg.Dir); err == nil && there {
		if err := checkDir(cfg.Dir); err != nil {
			return false, err
		}
	}
	rootFile := filepath.Join(cfg.Dir, rootCert)
	there, err := exists(rootFile)
	if err != nil || there {
		return there, err
	}
	for _, name := range []string{rootKey, intermediateCert, intermediateKey} {
		file := filepath.Join(cfg.Dir, name)
		if half, err := exists(file); err != nil || half {
			if err == nil {
				err = input.Wrong(rootFile, "put it back, or empty the directory to begin anew", "is missing beside %s", name)
			}
			return false, err
		}
	}
	return false, nil
}

// Check is Open without what Open writes: it says whether there is an authority
// in cfg.Dir, and refuses one that Open would refuse. Of cfg it looks at Dir,
// TrustDomain and Now.
func Check(cfg Config) (there bool, err error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if there, err := exists(cfg.Dir); err != nil || !there {
		return false, err
	}
	if err := checkDir(cfg.Dir); err != nil {
		return false, err
	}
	if there, err := begun(cfg); err != nil || !there {
		return false, err
	}
	_, err = load(cfg, checkOnly)
	return true, err
}

// occasion is why the directory is loaded.
type occasion uint8

const (
	again     occasion = iota // while it is used
	atStart                   // the root's key is checked too
	checkOnly                 // as at the start, and nothing is written
)

// lacks is the error of a node that can neither sign nor make what signs.
func lacks(err error) error {
	var e *input.Error
	if errors.As(err, &e) {
		return input.Wrong(e.Path, "give this node an intermediate with `ztunnel ca intermediate`", "no such file or directory, and no %s to make it with", rootKey)
	}
	return err
}

// load reads and checks the directory. The root's key is touched at the start,
// to check it, and when it is needed.
func load(cfg Config, how occasion) (files, error) {
	if err := checkDir(cfg.Dir); err != nil {
		return files{}, err
	}
	roots, err := readRoots(cfg.Dir)
	if err != nil {
		return files{}, err
	}
	now := cfg.Now()
	inter, err := readPair(cfg.Dir)
	none := missing(err)
	if err != nil && !none {
		return files{}, err
	}
	due, warning := none || pastHalf(inter.cert, now), ""
	if how != again || due {
		root, rerr := readRoot(cfg.Dir, roots)
		switch {
		case rerr != nil && !missing(rerr):
			return files{}, rerr
		case rerr != nil && none:
			return files{}, lacks(err)
		case how == checkOnly && none:
			return files{}, checkDomain(filepath.Join(cfg.Dir, rootCert), root.cert, cfg.TrustDomain)
		case how == checkOnly && due:
		case rerr != nil && due:
			warning = "the intermediate is past half its life and the root's key is not here: bring a new one made with `ztunnel ca intermediate`"
		case due:
			made, err := makeIntermediate(cfg, root, inter, now)
			if err != nil && none {
				return files{}, err
			}
			if err != nil { // the one that is there may still do
				warning = err.Error()
				break
			}
			inter = made
		}
	}
	if err := checkIntermediate(cfg.Dir, inter.cert, roots, cfg.TrustDomain, now); err != nil {
		return files{}, err
	}
	return files{roots, inter, warning}, nil
}

// makeIntermediate renews old, or makes one where there is none.
func makeIntermediate(cfg Config, root, old pair, now time.Time) (pair, error) {
	if err := checkDomain(filepath.Join(cfg.Dir, rootCert), root.cert, cfg.TrustDomain); err != nil {
		return pair{}, err
	}
	made := old
	var err error
	if old.cert == nil {
		if err = newIntermediate(cfg.Dir, root, cfg.TrustDomain, now); err == nil {
			made, err = readPair(cfg.Dir)
		}
	} else {
		made, err = renewIntermediate(cfg.Dir, root, old, cfg.TrustDomain, now)
	}
	if err != nil {
		return pair{}, err
	}
	cfg.Logger.Info("made an intermediate", "dir", cfg.Dir, "valid_until", made.cert.NotAfter)
	return made, nil
}

func bundles(own spiffeid.TrustDomain, roots []*x509.Certificate, more map[spiffeid.TrustDomain][]*x509.Certificate) map[spiffeid.TrustDomain]*x509bundle.Bundle {
	all := map[spiffeid.TrustDomain]*x509bundle.Bundle{
		own: x509bundle.FromX509Authorities(own, roots),
	}
	for td, extra := range more {
		if all[td] == nil {
			all[td] = x509bundle.New(td)
		}
		for _, r := range extra {
			all[td].AddX509Authority(r) // which leaves out what it has
		}
	}
	return all
}

// SetExtraRoots replaces Config.ExtraRoots. Handshakes from now on go by them;
// what is open goes on. The map is not to be changed afterwards.
func (a *Authority) SetExtraRoots(extra map[spiffeid.TrustDomain][]*x509.Certificate) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.extra = extra
	a.bundles = bundles(a.cfg.TrustDomain, a.files.roots, extra)
	a.announce()
}

// Bundle is identity.BundleSource's.
func (a *Authority) Bundle(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
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

// announce is called with a.mu held.
func (a *Authority) announce() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// SVID is identity.Source's. It issues at the first call for an identity, and
// renews one that has passed half its life; when that fails, the valid one is
// returned, and when none is valid any more, an identity.Failure with the reason
// certificate_expired: the next call tries again. It waits for nothing but a signature, so ctx is not looked at.
func (a *Authority) SVID(_ context.Context, id spiffeid.ID) (*identity.SVID, error) {
	switch {
	case id.TrustDomain() != a.cfg.TrustDomain:
		return nil, fmt.Errorf("issue %q: this authority is of trust domain %s", id, a.cfg.TrustDomain)
	case id.Path() == "":
		return nil, fmt.Errorf("issue %s: it has no path and names no workload", id)
	}
	a.mu.Lock()
	e := a.svids[id]
	if e == nil {
		e = &entry{}
		a.svids[id] = e
	}
	e.asked = a.cfg.Now()
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
	a.mu.Lock()
	by := a.files.intermediate
	a.mu.Unlock()
	s, err := issue(by, id, a.cfg.LeafTTL, now)
	if err != nil {
		if e.svid != nil && !now.After(e.svid.Leaf().NotAfter) {
			e.renew = earlier(now.Add(retryEvery), e.svid.Leaf().NotAfter)
			a.cfg.Logger.Warn("renew certificate", "identity", id.String(), "err", err, "valid_until", e.svid.Leaf().NotAfter)
			return e.svid, nil
		}
		return nil, overdue(e.svid, by, now, err)
	}
	renewal := e.svid != nil
	e.svid, e.renew = s, renewAt(now, s.Leaf().NotAfter)
	if renewal {
		a.mu.Lock()
		a.announce()
		a.mu.Unlock()
	}
	return s, nil
}

// overdue is the error of an issuance, with its reason where that is that time
// has run out: last is the SVID that could not be renewed, if there was one.
func overdue(last *identity.SVID, by pair, now time.Time, err error) error {
	switch {
	case last != nil:
		err = fmt.Errorf("this workload's own certificate ended at %s and cannot be renewed: %w", last.Leaf().NotAfter.UTC().Format(time.RFC3339), err)
	case now.Before(by.cert.NotAfter):
		return err
	}
	return &identity.Failure{Reason: identity.ReasonCertificateExpired, Detail: err.Error(), Err: err}
}

// renewAt is half the life, a tenth of that earlier or later, so that what was
// issued together is not renewed together.
func renewAt(now, end time.Time) time.Time {
	life := float64(end.Sub(now))
	return now.Add(time.Duration(life * (0.45 + 0.1*rand.Float64())))
}

// issue makes a key and a leaf that lives for ttl, or as long as its issuer.
func issue(by pair, id spiffeid.ID, ttl time.Duration, now time.Time) (*identity.SVID, error) {
	if !now.Before(by.cert.NotAfter) {
		return nil, fmt.Errorf("issue %s: the intermediate has expired at %s: make a new one with `ztunnel ca intermediate`", id, by.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	key, err := newKey()
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	leaf, err := sign(&x509.Certificate{
		NotBefore:             now.Add(-backdate),
		NotAfter:              earlier(now.Add(ttl), by.cert.NotAfter),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.URL()},
	}, by, key.Public())
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	return &identity.SVID{ID: id, Certificates: []*x509.Certificate{leaf, by.cert}, Key: key}, nil
}

// Run renews SVIDs before they expire, forgets those that nobody has asked for
// during the life of a leaf, and takes up files that have changed, until ctx
// ends. Files that cannot be used are logged once, and what was there before
// stays in use.
func (a *Authority) Run(ctx context.Context) {
	tick := time.NewTicker(min(retryEvery, max(a.cfg.LeafTTL/20, time.Second)))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if news, err := a.reload(); news {
			a.report(err)
		}
		for id, e := range a.used() {
			if _, err := a.current(e, id); err != nil {
				a.cfg.Logger.Error("renew certificate", "identity", id.String(), "err", err)
			}
		}
	}
}

// used drops what is not used and returns the rest.
func (a *Authority) used() map[spiffeid.ID]*entry {
	a.mu.Lock()
	defer a.mu.Unlock()
	oldest := a.cfg.Now().Add(-a.cfg.LeafTTL)
	maps.DeleteFunc(a.svids, func(_ spiffeid.ID, e *entry) bool { return e.asked.Before(oldest) })
	return maps.Clone(a.svids)
}
