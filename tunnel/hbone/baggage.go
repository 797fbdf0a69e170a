// SPDX-License-Identifier: Apache-2.0

package hbone

import (
	"net/url"
	"strings"
)

// Baggage describes the source workload, under OpenTelemetry's names. Istio
// sends the workload as k8s.deployment.name, k8s.cronjob.name, k8s.job.name or
// k8s.pod.name, by its kind.
type Baggage struct {
	Cluster      string // k8s.cluster.name
	Namespace    string // k8s.namespace.name
	Pod          string // k8s.pod.name
	Workload     string // k8s.<WorkloadKind>.name, of the other three kinds
	WorkloadKind string // deployment, cronjob or job
	Service      string // service.name
	Version      string // service.version
	Region       string // cloud.region
	Zone         string // cloud.availability_zone
}

// member is a name and where its value lies.
type member struct {
	name  string
	value *string
}

func (b *Baggage) members() [8]member {
	kind := ""
	if workloadKind(b.WorkloadKind) {
		kind = "k8s." + b.WorkloadKind + ".name"
	}
	return [8]member{
		{"k8s.cluster.name", &b.Cluster},
		{"k8s.namespace.name", &b.Namespace},
		{kind, &b.Workload},
		{"k8s.pod.name", &b.Pod},
		{"service.name", &b.Service},
		{"service.version", &b.Version},
		{"cloud.region", &b.Region},
		{"cloud.availability_zone", &b.Zone},
	}
}

func workloadKind(s string) bool { return s == "deployment" || s == "cronjob" || s == "job" }

// String is the field's value; empty members are left out.
func (b Baggage) String() string {
	var w strings.Builder
	for _, m := range b.members() {
		if m.name == "" || *m.value == "" {
			continue
		}
		if w.Len() > 0 {
			w.WriteByte(',')
		}
		w.WriteString(m.name)
		w.WriteByte('=')
		escape(&w, *m.value)
	}
	return w.String()
}

// escape percent-encodes what may not stand in a value (W3C Baggage, 3.3.1.3),
// and '=', at which Istio splits.
func escape(w *strings.Builder, s string) {
	const hex = "0123456789ABCDEF"
	for i := range len(s) {
		switch c := s[i]; {
		case c <= ' ', c >= 0x7f, strings.IndexByte(`",;\%=`, c) >= 0:
			w.WriteByte('%')
			w.WriteByte(hex[c>>4])
			w.WriteByte(hex[c&15])
		default:
			w.WriteByte(c)
		}
	}
}

// parseBaggage takes what it knows from the values of baggage fields; of a
// member that comes twice, the last. It never fails: what is malformed or
// longer than 8192 bytes in all is left out.
func parseBaggage(values []string) Baggage {
	var b Baggage
	total := 0
	for _, v := range values {
		if total += len(v); total > maxBaggage {
			break
		}
		for v != "" {
			var m string
			m, v, _ = strings.Cut(v, ",")
			m, _, _ = strings.Cut(m, ";") // properties
			name, value, ok := strings.Cut(m, "=")
			if !ok {
				continue
			}
			value = strings.TrimSpace(value)
			if u, err := url.PathUnescape(value); err == nil {
				value = u
			}
			if !printable(value) {
				continue
			}
			b.set(strings.TrimSpace(name), value)
		}
	}
	return b
}

func (b *Baggage) set(name, value string) {
	if kind, ok := strings.CutPrefix(name, "k8s."); ok {
		if kind, ok = strings.CutSuffix(kind, ".name"); ok && workloadKind(kind) {
			b.Workload, b.WorkloadKind = value, kind
			return
		}
	}
	for _, m := range b.members() {
		if m.name == name && name != "" {
			*m.value = value
			return
		}
	}
}

// printable keeps control characters out of logs.
func printable(s string) bool {
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return false
		}
	}
	return true
}
