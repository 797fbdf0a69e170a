// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"io/fs"
	"os"

	"github.com/culvert-mesh/culvert/config"
	"github.com/culvert-mesh/culvert/internal/input"
	"github.com/culvert-mesh/culvert/redirect"
)

// Check says whether the folders that a configuration names for the daemon itself
// can be used, and changes nothing. Its error is an *input.Error, with the mend.
func Check(cfg *config.Config) error {
	return errors.Join(checkRunDir(cfg.RunDir), redirect.CheckCgroup(cfg.Cgroup))
}

// checkRunDir refuses what is no folder; one that is missing is made at the start.
func checkRunDir(dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if _, lerr := os.Lstat(dir); errors.Is(lerr, fs.ErrNotExist) {
			return nil
		}
	}
	switch {
	case err != nil:
		e := input.Unusable(dir, err)
		e.Mend = "correct runDir"
		return e
	case !info.IsDir():
		return input.Wrong(dir, "name one in runDir, or leave runDir out", "is no folder")
	}
	return nil
}
