// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/identity/ca"
)

// RootDir is the directory of the mesh's root: its certificate and key, in the layout of package ca.
func (l *Lab) RootDir() string { return filepath.Join(l.Dir, "root") }

// giveAuthority fills a node's CA directory, unless it has one: an intermediate of its own below the lab's root, as
// "ztunnel ca" makes them.
func (l *Lab) giveAuthority(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	td, err := spiffeid.TrustDomainFromString(TrustDomain)
	if err != nil {
		return err
	}
	now := time.Now()
	if !l.rooted {
		if err := ca.Init(l.RootDir(), td, now); err != nil {
			return fmt.Errorf("make root: %w", err)
		}
		l.rooted = true
	}
	if err := ca.NewIntermediate(l.RootDir(), dir, td, now); err != nil {
		return fmt.Errorf("make intermediate: %w", err)
	}
	return nil
}
