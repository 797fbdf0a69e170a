// SPDX-License-Identifier: Apache-2.0

// Package arrows holds no code: its test keeps the arrows between the
// project's packages as they were drawn. Who wants to draw another one changes
// the table in the test, and says why.
package arrows
