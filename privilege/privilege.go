// SPDX-License-Identifier: Apache-2.0

// Package privilege is what the daemon may do on its node: the capabilities that it
// needs, with the reason for each. It knows nothing of what the daemon does with
// them.
package privilege
