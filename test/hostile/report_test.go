// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// report is the page that `make soak` writes.
type report struct{ rows strings.Builder }

func (r *report) add(kind string, total result, memory float64, p99 latency, one *latency) {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.2f", float64(d)/float64(time.Millisecond)) }
	per := func(n int64) string { return fmt.Sprintf("%.0f", float64(n)/total.Seconds) }
	alone := ""
	if one != nil {
		alone = fmt.Sprintf("%s (%s)", ms(one.attacked), ms(one.quiet))
	}
	fmt.Fprintf(&r.rows, "| %s | %s | %s | %.1f | %.1f | %s | %s | %s | %s |\n",
		kind, per(total.Connections), per(total.Frames), float64(total.Bytes)/1e6/total.Seconds, memory, ms(p99.quiet), ms(p99.attacked), ms(p99.machine), alone)
}

func (r *report) write(path string, length time.Duration, idle float64) error {
	page := fmt.Sprintf(`# Hostile peers, measured

Made by %[1]smake soak%[1]s: each peer that breaks the rules for %[2]v at the full speed that the machine has left, against the real daemon, while another pair of pods talks through the same two daemons. [wire.md](wire.md#bounds) has the bounds; the kinds are in %[1]stest/hostile/kinds_test.go%[1]s.

%[3]s, Linux %[10]s, %[11]d CPUs, %[12]s. Commit %[4]s, %[5]s.

The idle daemon had %.1[6]f MiB; a hostile peer may add %[7]d MiB. The p99 is that of 64 bytes and back, the best of the rounds that the time is divided into; it may be twice the quiet one and %[8]v. A session that breaks the rules has its address wait a second for the next one; to be at full speed all the same, the attacker has 512 addresses. The last column has the p99 where it has one, as a pod has, and beside it the quiet one; there it may be twice that and %[13]v. Attackers and their applications have what of the processors the daemons and the other pair leave, as if they were other machines. Without the mesh is the same between two other pods, at the same time: what the machine takes.

| kind | connections a second | frames a second | MB a second | MiB above idle | p99 quiet, ms | attacked, ms | without the mesh, ms | from one address (quiet), ms |
|---|---|---|---|---|---|---|---|---|
%[9]s`, "`", length, lab.CPU(), lab.Commit(), time.Now().UTC().Format(time.DateOnly), idle, allowed, noise, r.rows.String(), lab.Kernel(), runtime.NumCPU(), runtime.Version(), hush)
	return os.WriteFile(path, []byte(page), 0o644)
}
