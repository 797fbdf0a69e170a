// SPDX-License-Identifier: Apache-2.0

// Package peers has tests only, of the real daemon against other
// implementations of what it speaks; main_test.go says how they are laid out.
package peers
