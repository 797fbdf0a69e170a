// SPDX-License-Identifier: Apache-2.0

// Package limits holds no code: its test keeps docs/limits.md true to the
// constants that it names.
package limits
