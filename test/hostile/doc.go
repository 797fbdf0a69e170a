// SPDX-License-Identifier: Apache-2.0

// Package hostile has peers that break the rules at full speed, each for some
// seconds, against the real daemon, while another pair of pods talks through it:
// the daemon's memory, the other pair's latency and what is left afterwards are
// measured. Needs root.
package hostile
