// SPDX-License-Identifier: Apache-2.0

// Package e2e has tests only, of the real daemon on real packets; main_test.go
// says how they are laid out.
package e2e
