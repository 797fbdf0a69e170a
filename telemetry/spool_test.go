// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// In a synctest bubble a line that waited for its reader would be a deadlock, which
// the bubble reports. The control is the same logger without a spool.
func TestAStuckReaderOfTheLogBlocksNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newStuck()
		s := NewSpool(w)
		log := slog.New(slog.NewTextHandler(s, nil))
		log.Info("first")
		<-w.entered
		long := strings.Repeat("x", 1000)
		for range 3 * maxSpool / 1000 {
			log.Info(long)
		}
		if n := s.Dropped(); n < maxSpool/1000 {
			t.Errorf("%d lines are dropped of those that did not fit", n)
		}
		start := time.Now()
		if err := s.Close(); err == nil || time.Since(start) != closeWait {
			t.Errorf("closed after %s: %v", time.Since(start), err)
		}

		blocked := make(chan struct{})
		go func() {
			slog.New(slog.NewTextHandler(w, nil)).Info("control")
			close(blocked)
		}()
		synctest.Wait()
		select {
		case <-blocked:
			t.Error("control: a logger without a spool went on")
		default:
		}
		close(w.release)
		<-blocked
	})
}

func TestASpoolWritesAllInOrder(t *testing.T) {
	var buf bytes.Buffer
	s := NewSpool(&buf)
	var want strings.Builder
	for range 1000 {
		want.WriteString("a line\n")
		if _, err := s.Write([]byte("a line\n")); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if buf.String() != want.String() {
		t.Errorf("%d bytes were written, want %d", buf.Len(), want.Len())
	}
	_, _ = s.Write([]byte("late\nlater\n"))
	if s.Dropped() != 2 {
		t.Errorf("%d are dropped, want the two behind Close", s.Dropped())
	}
}

func TestASpoolsErrorsAreCounted(t *testing.T) {
	w := &failing{broken: true}
	s := NewSpool(w)
	_, _ = s.Write([]byte("one\ntwo\n"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s.Dropped() != 2 {
		t.Errorf("%d are dropped, want 2", s.Dropped())
	}
}

// A disk that fills up within a line of the log, and has room again, tears none.
func TestASpoolTearsNoLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &full{left: len("one\ntw")}
		s := NewSpool(w)
		_, _ = s.Write([]byte("one\ntwo\nthree\n"))
		synctest.Wait()
		w.left = 100
		_, _ = s.Write([]byte("four\n"))
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if w.String() != "one\ntwo\nfour\n" || s.Dropped() != 1 {
			t.Errorf("%d are dropped, and written is %q", s.Dropped(), w)
		}
	})
}
