// SPDX-License-Identifier: Apache-2.0

// Package docs has tests only: they do what the README and the pages of docs/ tell
// a newcomer to do, command by command, on machines that are namespaces.
package docs
