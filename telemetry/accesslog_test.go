// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// stuck takes nothing until it is let go, and tells of its first Write.
type stuck struct {
	once    sync.Once
	entered chan struct{}
	release chan struct{}

	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func newStuck() *stuck {
	return &stuck{entered: make(chan struct{}), release: make(chan struct{})}
}

func (s *stuck) Write(p []byte) (int, error) {
	s.once.Do(func() { close(s.entered) })
	<-s.release
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *stuck) lines() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.buf.String(), "\n")
}

func openLog(t *testing.T, c AccessLogConfig) *AccessLog {
	t.Helper()
	l, err := NewAccessLog(c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// In a synctest bubble a Record that waited for the writer would be a deadlock,
// which the bubble reports; so this needs no clock.
func TestAStuckWriterNeverBlocksAndItsDropsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const queue, sent = 100, 1000
		w := newStuck()
		l := openLog(t, AccessLogConfig{Writer: w, Format: "json", Queue: queue})
		c := sample()
		l.Record(&c)
		<-w.entered // it holds one line
		for range sent - 1 {
			l.Record(&c)
		}
		if got, want := l.Dropped(), uint64(sent-queue); got != want {
			t.Errorf("%d dropped, want %d", got, want)
		}
		if got := l.Written(); got != 0 {
			t.Errorf("%d written by a writer that is stuck", got)
		}
		close(w.release)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if got := w.lines(); got != queue || l.Written() != queue {
			t.Errorf("%d lines in the writer, %d written, want the %d that were queued", got, l.Written(), queue)
		}
	})
}

func TestRoomReturnsWhenTheWriterGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const queue = 10
		w := newStuck()
		l := openLog(t, AccessLogConfig{Writer: w, Format: "text", Queue: queue})
		c := sample()
		for range 2 * queue {
			l.Record(&c)
		}
		<-w.entered
		close(w.release)
		synctest.Wait()
		before := l.Dropped()
		for range queue {
			l.Record(&c)
		}
		if got := l.Dropped(); got != before {
			t.Errorf("%d dropped while there was room", got-before)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if got, want := l.Written()+l.Dropped(), uint64(3*queue); got != want {
			t.Errorf("%d of %d lines are accounted for", got, want)
		}
	})
}

func TestCloseGivesUpAStuckWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newStuck()
		l := openLog(t, AccessLogConfig{Writer: w, Format: "json"})
		c := sample()
		l.Record(&c)
		<-w.entered
		l.Record(&c)
		start := time.Now()
		err := l.Close()
		if err == nil || !strings.Contains(err.Error(), "2 lines are lost") {
			t.Errorf("got %v", err)
		}
		if took := time.Since(start); took != closeWait {
			t.Errorf("it took %s", took)
		}
		if again := l.Close(); again != err {
			t.Errorf("a second Close: %v", again)
		}
		close(w.release) // lets the goroutine end
	})
}

func TestCloseWritesWhatIsQueued(t *testing.T) {
	var buf bytes.Buffer
	l := openLog(t, AccessLogConfig{Writer: &buf, Format: "json"})
	c := sample()
	const n = 3*chunkLen + 1
	for range n {
		l.Record(&c)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if got := bytes.Count(buf.Bytes(), []byte("\n")); got != n {
		t.Errorf("%d lines, want %d", got, n)
	}
	l.Record(&c)
	if l.Dropped() != 1 {
		t.Errorf("%d dropped, want the one behind Close", l.Dropped())
	}
}

func TestALineIsWrittenSoonWithoutClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newStuck()
		close(w.release)
		l := openLog(t, AccessLogConfig{Writer: w, Format: "json"})
		c := sample()
		start := time.Now()
		l.Record(&c)
		<-w.entered
		if took := time.Since(start); took > gather {
			t.Errorf("it took %s", took)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestHalfAQueueIsWrittenAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newStuck()
		close(w.release)
		l := openLog(t, AccessLogConfig{Writer: w, Format: "json", Queue: 10})
		c := sample()
		start := time.Now()
		for range 5 {
			l.Record(&c)
		}
		<-w.entered
		if took := time.Since(start); took != 0 {
			t.Errorf("it took %s", took)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// failing gives an error as long as it is told to.
type failing struct {
	mu     sync.Mutex
	broken bool // guarded by mu
	bytes.Buffer
}

func (f *failing) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken {
		return 0, errors.New("no space left on device")
	}
	return f.Buffer.Write(p)
}

func TestAWriterThatFailsIsNamedOnceAndItsLinesAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &failing{broken: true}
		var said bytes.Buffer
		l := openLog(t, AccessLogConfig{Writer: w, Format: "json", Logger: slog.New(slog.NewTextHandler(&said, nil))})
		c := sample()
		for range 3 {
			l.Record(&c)
			time.Sleep(2 * gather) // of the bubble
			synctest.Wait()
		}
		w.mu.Lock()
		w.broken = false
		w.mu.Unlock()
		l.Record(&c)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if l.Dropped() != 3 || l.Written() != 1 {
			t.Errorf("%d dropped, %d written; want 3, 1", l.Dropped(), l.Written())
		}
		if n := strings.Count(said.String(), "no space left on device"); n != 1 {
			t.Errorf("the error is named %d times:\n%s", n, &said)
		}
	})
}

func TestNewAccessLogRefuses(t *testing.T) {
	if _, err := NewAccessLog(AccessLogConfig{}); err == nil {
		t.Error("no writer is taken")
	}
	if _, err := NewAccessLog(AccessLogConfig{Writer: io.Discard, Format: "xml"}); err == nil || !strings.Contains(err.Error(), "auto, json, text") {
		t.Errorf("format xml: %v", err)
	}
}

func TestAutoIsJSONOffATerminal(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l := openLog(t, AccessLogConfig{Writer: w, Format: "auto"})
	c := sample()
	l.Record(&c)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	got, err := io.ReadAll(r)
	if err != nil || !bytes.HasPrefix(got, []byte("{")) {
		t.Errorf("%q, %v", got, err)
	}
}

func TestRecordFromManyLoops(t *testing.T) {
	const loops, each = 4, 2000
	var buf bytes.Buffer
	l := openLog(t, AccessLogConfig{Writer: &buf, Format: "json", Queue: 512})
	var wg sync.WaitGroup
	for range loops {
		wg.Go(func() {
			c := sample()
			for range each {
				l.Record(&c)
			}
		})
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if got := l.Written() + l.Dropped(); got != loops*each {
		t.Errorf("%d of %d lines are accounted for", got, loops*each)
	}
	if got := uint64(bytes.Count(buf.Bytes(), []byte("\n"))); got != l.Written() {
		t.Errorf("%d lines in the writer, %d counted", got, l.Written())
	}
}

// BenchmarkRecord is what an event loop pays for a line that finds room. The
// queue is emptied outside of what is measured.
func BenchmarkRecord(b *testing.B) {
	const queue = 4096
	l, err := NewAccessLog(AccessLogConfig{Writer: io.Discard, Format: "json", Queue: queue})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	c := sample()
	b.ReportAllocs()
	for n := uint64(1); b.Loop(); n++ {
		l.Record(&c)
		if n%queue == 0 {
			b.StopTimer()
			for l.Written() < n {
				runtime.Gosched()
			}
			b.StartTimer()
		}
	}
	if n := l.Dropped(); n > 0 {
		b.Errorf("%d dropped", n)
	}
}
