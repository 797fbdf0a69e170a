// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Sample is one line of a scrape.
type Sample struct {
	Name   string
	Labels map[string]string
	Value  float64
}

// Metrics are the samples of one scrape.
type Metrics []Sample

// Sum adds the samples of a name that have all the given labels, as name, value, name, value…
func (m Metrics) Sum(name string, labels ...string) float64 {
	sum := 0.0
	for _, s := range m {
		match := s.Name == name
		for i := 0; i+1 < len(labels); i += 2 {
			match = match && s.Labels[labels[i]] == labels[i+1]
		}
		if match {
			sum += s.Value
		}
	}
	return sum
}

// parseMetrics reads the Prometheus text format, version 0.0.4.
func parseMetrics(r io.Reader) (Metrics, error) {
	var out Metrics
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for n := 1; s.Scan(); n++ {
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		sample, err := parseSample(line)
		if err != nil {
			return nil, fmt.Errorf("parse metrics: line %d: %w", n, err)
		}
		out = append(out, sample)
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("read metrics: %w", err)
	}
	return out, nil
}

func parseSample(line string) (Sample, error) {
	var s Sample
	end := strings.IndexAny(line, "{ ")
	if end < 0 {
		return s, errors.New("no value")
	}
	s.Name = line[:end]
	rest := line[end:]
	if rest[0] == '{' {
		s.Labels = make(map[string]string)
		rest = rest[1:]
		for !strings.HasPrefix(rest, "}") {
			name, after, ok := strings.Cut(rest, "=")
			if !ok {
				return s, errors.New("label without a value")
			}
			quoted, err := strconv.QuotedPrefix(after)
			if err != nil {
				return s, fmt.Errorf("label %s: %w", name, err)
			}
			if s.Labels[strings.TrimSpace(name)], err = strconv.Unquote(quoted); err != nil {
				return s, fmt.Errorf("label %s: %w", name, err)
			}
			rest = strings.TrimPrefix(after[len(quoted):], ",")
		}
		rest = rest[1:]
	}
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return s, errors.New("no value")
	}
	var err error
	s.Value, err = strconv.ParseFloat(fields[0], 64)
	return s, err
}
