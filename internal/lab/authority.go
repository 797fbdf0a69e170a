// SPDX-License-Identifier: Apache-2.0

package lab

// giveAuthority leaves the making of a CA to the daemon: enough for a lab of one node.
func (l *Lab) giveAuthority(string) error { return nil }
