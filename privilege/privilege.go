// SPDX-License-Identifier: Apache-2.0

// Package privilege is what the daemon may do on its node, and takes the rest away:
// Reduce the capabilities, before the daemon does anything; Confine the system
// calls, before it hears of any pod or peer. It knows nothing of what the daemon
// does with what is left.
//
// There is no way back from either. Both hold for every thread of the process, also
// in a build with cgo (and so with the race detector), where Go cannot make a
// system call on all of its threads.
package privilege
