// SPDX-License-Identifier: Apache-2.0

package loop

// PostedShare is the share of a turn of what was posted.
const PostedShare = postedShare
