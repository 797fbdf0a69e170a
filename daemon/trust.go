// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/x509"
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/config/watch"
)

// rooter is what a change of the further roots is told to.
type rooter interface {
	SetExtraRoots(map[spiffeid.TrustDomain][]*x509.Certificate)
}

// trust is the trust file with the PEM files that it names, read again when one of
// them changes. One that cannot be taken changes nothing.
type trust struct {
	path    string // empty: there is none
	inForce atomic.Pointer[config.Trust]

	// Set before watch and reload.
	issuer rooter
	revoke func() // has the deny list applied to what is open

	mu    sync.Mutex             // guards what follows, and orders changes
	files map[string]*watch.File // what is looked at
	text  []byte                 // of the trust file, as it was read last; nil: it could not be
}

// readTrust reads the file for the first time.
func readTrust(path string) (*trust, error) {
	t := &trust{path: path}
	t.inForce.Store(&config.Trust{})
	if path == "" {
		return t, nil
	}
	read, err := t.read()
	if err != nil {
		return nil, err
	}
	t.inForce.Store(read)
	return t, nil
}

// Denied fits tunnel.Config.Denied.
func (t *trust) Denied(c *x509.Certificate, id spiffeid.ID) (string, bool) {
	return t.inForce.Load().Denied(c, id)
}

// read reads the trust file now. The caller holds mu, or is alone.
func (t *trust) read() (*config.Trust, error) {
	if t.files == nil {
		t.follow(nil)
	}
	data, err := t.files[t.path].Read()
	return t.parse(data, err)
}

// parse reads what the trust file holds by the watch, which knows an emptied file
// from an empty one and half of a file from the whole; and has those that it names
// looked at from now on. What changes in them meanwhile is read here or found by
// the next look. The caller holds mu, or is alone.
func (t *trust) parse(data []byte, err error) (*config.Trust, error) {
	if err != nil {
		t.text = nil
		return nil, err
	}
	t.text = data
	for {
		read, err := config.ParseTrust(t.path, data)
		if t.follow(read.Files) {
			continue
		}
		return read, err
	}
}

// follow has the trust file and those that it names looked at, and reports whether
// that is news of one of them.
func (t *trust) follow(named []string) (more bool) {
	files := map[string]*watch.File{}
	for _, path := range append([]string{t.path}, named...) {
		if files[path] != nil {
			continue
		}
		if files[path] = t.files[path]; files[path] == nil {
			more = true
			files[path] = watch.New(path)
			_, _ = files[path].Read() // so that a change is one from here
		}
	}
	t.files = files
	return more
}

// take puts what was read in force. Who is denied is denied first.
func (t *trust) take(read *config.Trust, err error) error {
	if err != nil {
		return err
	}
	t.inForce.Store(read)
	t.issuer.SetExtraRoots(read.Roots)
	t.revoke()
	return nil
}

// reload reads the files now.
func (t *trust) reload(r *reports) {
	if t.path == "" {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	r.say("trust", t.take(t.read()))
}

// watch takes changes of the files until ctx ends.
func (t *trust) watch(ctx context.Context, r *reports) {
	if t.path == "" {
		return
	}
	watch.Run(ctx, func() { t.look(r) })
}

// look is one look of watch.
func (t *trust) look(r *reports) {
	t.mu.Lock()
	defer t.mu.Unlock()
	data, changed, err := t.files[t.path].Changed()
	named := false
	for path, f := range t.files {
		if path != t.path {
			_, is, _ := f.Changed() // what is wrong with it is told when it is parsed
			named = named || is
		}
	}
	switch {
	case changed:
		r.say("trust", t.take(t.parse(data, err)))
	case named && t.text != nil:
		r.say("trust", t.take(t.parse(t.text, nil)))
	}
}
