// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/internal/lab"
)

// pace is the time between an answer and the next request.
const pace = time.Millisecond

// requests is the other pair's traffic for as long as f runs: 64 bytes and back,
// on connections that were there before. It returns how long each took, and what
// those would have taken that were not sent meanwhile: one that waits for 100 ms
// stands for a hundred, or else a standstill would be one slow request. The same
// goes on between two pods without the mesh: what the machine takes.
func (b *bench) requests(f func()) (pair, machine []time.Duration) {
	b.t.Helper()
	over := make(chan struct{})
	ask := func(who string, conns []net.Conn) (all func() []time.Duration) {
		took := make(chan []time.Duration, len(conns))
		for _, c := range conns {
			go func() {
				var mine []time.Duration
				defer func() { took <- mine }()
				p := make([]byte, 64)
				for {
					select {
					case <-over:
						return
					case <-time.After(pace):
					}
					_ = c.SetDeadline(time.Now().Add(10 * time.Second))
					start := time.Now()
					_, err := c.Write(p)
					if err == nil {
						_, err = io.ReadFull(c, p)
					}
					if err != nil {
						b.t.Errorf("%s: %v", who, err)
						return
					}
					for d := time.Since(start); d > 0; d -= pace {
						mine = append(mine, d)
					}
				}
			}()
		}
		return func() (all []time.Duration) {
			for range conns {
				all = append(all, <-took...)
			}
			if len(all) == 0 {
				b.t.Fatalf("%s had no answer at all", who)
			}
			return all
		}
	}
	pairs, plain := ask("the other pair", b.pairs), ask("the pair without the mesh", b.plain)
	f()
	close(over)
	return pairs(), plain()
}

// latency is the other pair's p99 in a round.
type latency struct {
	quiet, attacked time.Duration // before the attack, and during it
	calm, machine   time.Duration // the same without the mesh: what the machine takes
	noise           time.Duration // what else it may be more than twice the quiet one
	samples         int           // of the least
}

// hops is how many threads wake one another for a request and its answer, for each
// that does so where there is no tunnel: six, and two.
const hops = 3

const (
	// noise is by how much a p99 may be more than twice the quiet one, on a machine
	// with two processors: the attacked daemon's loops and its handshakes share them
	// with what the kernel does for the attacker's packets. A request passes that
	// daemon twice, and may wait there for a turn of a loop, up to 0.7 ms, and for
	// others.
	noise = 6 * time.Millisecond

	// hush is the same where the attacker is one address, which waits for its next
	// session: no more than two such turns.
	hush = 1500 * time.Microsecond
)

// bound is what the p99 may be during the attack: twice the quiet one, what a
// machine that has other work meanwhile takes more of those without the mesh, for
// each thread, and noise.
func (l latency) bound() time.Duration {
	return 2*l.quiet + hops*max(0, l.machine-l.calm) + l.noise*lab.Slowness()
}

func (l latency) tooSlow() bool { return l.attacked > l.bound() }

func (l latency) String() string {
	us := func(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }
	return fmt.Sprintf("%v quiet, %v attacked (%.1f times), bound %v; without the mesh %v and %v; at least %d samples",
		us(l.quiet), us(l.attacked), float64(l.attacked)/float64(l.quiet), us(l.bound()), us(l.calm), us(l.machine), l.samples)
}

// round measures for some time without and for as long as attack runs with it.
func (b *bench) round(quiet time.Duration, attack func()) (l latency) {
	b.t.Helper()
	before, calm := b.requests(func() {
		select {
		case <-time.After(quiet):
		case <-b.ctx.Done():
		}
	})
	during, machine := b.requests(attack)
	return latency{p99(before), p99(during), p99(calm), p99(machine), noise, min(len(before), len(during), len(machine))}
}

// best joins two rounds: what the daemon does to the other pair it does in each of
// them, what the machine does in some. It takes the one that is less beyond its
// bound, and the quieter of both quiet parts.
func best(a, b latency) latency {
	quiet, calm := min(a.quiet, b.quiet), min(a.calm, b.calm)
	samples := min(a.samples, b.samples)
	a.quiet, b.quiet, a.calm, b.calm = quiet, quiet, calm, calm
	if b.attacked-b.bound() < a.attacked-a.bound() {
		a = b
	}
	a.samples = samples
	return a
}

// p99 is of samples, of which there is one at least, and which it sorts.
func p99(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)*99/100]
}

// resident is the daemon's memory, MiB. It costs the daemon nothing.
func (b *bench) resident() float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", b.daemon.PID()))
	if err != nil {
		return 0 // it has ended, which others notice
	}
	pages, _ := strconv.Atoi(strings.Fields(string(text))[1])
	return float64(pages) * float64(unix.Getpagesize()) / (1 << 20)
}

// watchMemory returns a function that returns the most since.
func (b *bench) watchMemory() (most func() float64) {
	stop, top := make(chan struct{}), make(chan float64)
	go func() {
		n := 0.0
		for {
			n = max(n, b.resident())
			select {
			case <-stop:
				top <- n
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	return func() float64 { close(stop); return <-top }
}

func (b *bench) metric(name string, labels ...string) float64 {
	b.t.Helper()
	m, err := b.daemon.Metrics(b.ctx)
	b.must(err)
	return m.Sum(name, labels...)
}
