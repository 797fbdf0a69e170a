// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"crypto/x509"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Reload reads the directory now, as Run does now and then, and returns why it
// cannot be used, whether that is news or not. Report does not hear of it.
func (a *Authority) Reload() error {
	_, err := a.reload()
	return err
}

// reload reads the directory, and says whether that changes anything. With another
// intermediate all leaves are due, so that a root can be taken out as soon as its
// successor signs.
func (a *Authority) reload() (news bool, err error) {
	a.loading.Lock()
	defer a.loading.Unlock()
	f, err := load(a.cfg, again)
	if err != nil {
		return a.outcome(err.Error()), err
	}
	a.say(f.warning)
	taken, due := a.take(f)
	for _, e := range due {
		e.mu.Lock()
		e.renew = time.Time{}
		e.mu.Unlock()
	}
	mended := a.outcome("")
	return taken || mended, nil
}

// outcome notes why files cannot be used, if so, and says whether that is news.
func (a *Authority) outcome(why string) (news bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	news = a.failed != why
	a.failed = why
	return news
}

// report says how files were read again.
func (a *Authority) report(err error) {
	switch {
	case a.cfg.Report != nil:
		a.cfg.Report(err)
	case err != nil:
		a.cfg.Logger.Error("CA files are not taken: the earlier ones stay in use", "dir", a.cfg.Dir, "err", err)
	}
}

// take makes f the current files, says whether they are others, and returns the
// entries that are due by them.
func (a *Authority) take(f files) (taken bool, due map[spiffeid.ID]*entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !f.intermediate.cert.Equal(a.files.intermediate.cert) {
		due = maps.Clone(a.svids)
	} else if slices.EqualFunc(f.roots, a.files.roots, (*x509.Certificate).Equal) {
		return false, nil
	}
	a.files, a.bundles = f, bundles(a.cfg.TrustDomain, f.roots, a.extra)
	a.announce()
	a.cfg.Logger.Info("took up changed CA files", "dir", a.cfg.Dir, "roots", len(f.roots), "valid_until", f.intermediate.cert.NotAfter)
	return true, due
}

// say logs what is wrong with the files, once.
func (a *Authority) say(what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if what != a.said && what != "" {
		a.cfg.Logger.Warn("CA files need attention", "dir", a.cfg.Dir, "why", what)
	}
	a.said = what
}
