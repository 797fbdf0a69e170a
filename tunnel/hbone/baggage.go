// SPDX-License-Identifier: Apache-2.0

package hbone

import "strings"

// Baggage is what a source says of itself, in the W3C baggage field, under the
// names that Istio's ambient mode uses. It is information: nothing is decided
// by it.
type Baggage struct {
	Cluster   string // k8s.cluster.name
	Namespace string // k8s.namespace.name
	Pod       string // k8s.pod.name
	Workload  string // k8s.deployment.name, k8s.job.name or k8s.cronjob.name
	Kind      string // which of them: deployment, job, cronjob; empty: deployment
	Service   string // service.name
	Revision  string // service.version
	Region    string // cloud.region
	Zone      string // cloud.availability_zone
}

// String is the value of the field. Empty values, and such as cannot stand in
// one, are left out.
func (b Baggage) String() string {
	var s strings.Builder
	add := func(key, value string) {
		if value == "" || len(value) > maxValue || !plain(value) {
			return
		}
		if s.Len() > 0 {
			s.WriteByte(',')
		}
		s.WriteString(key)
		s.WriteByte('=')
		s.WriteString(value)
	}
	add("k8s.cluster.name", b.Cluster)
	add("k8s.namespace.name", b.Namespace)
	add("k8s.pod.name", b.Pod)
	switch b.Kind {
	case "job", "cronjob":
		add("k8s."+b.Kind+".name", b.Workload)
	default:
		add("k8s.deployment.name", b.Workload)
	}
	add("service.name", b.Service)
	add("service.version", b.Revision)
	add("cloud.region", b.Region)
	add("cloud.availability_zone", b.Zone)
	return s.String()
}

// parse adds what one field says; there may be several. Of a key said twice
// the first counts.
func (b *Baggage) parse(s string) {
	set := func(dst *string, v string) bool {
		if *dst != "" {
			return false
		}
		*dst = v
		return true
	}
	for member := range strings.SplitSeq(s, ",") {
		member, _, _ = strings.Cut(member, ";") // properties
		key, value, ok := strings.Cut(member, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok || value == "" || len(value) > maxValue || !plain(value) {
			continue
		}
		switch key {
		case "k8s.cluster.name":
			set(&b.Cluster, value)
		case "k8s.namespace.name":
			set(&b.Namespace, value)
		case "k8s.pod.name":
			set(&b.Pod, value)
		case "k8s.deployment.name":
			if set(&b.Workload, value) {
				b.Kind = "deployment"
			}
		case "k8s.job.name":
			if set(&b.Workload, value) {
				b.Kind = "job"
			}
		case "k8s.cronjob.name":
			if set(&b.Workload, value) {
				b.Kind = "cronjob"
			}
		case "service.name":
			set(&b.Service, value)
		case "service.version":
			set(&b.Revision, value)
		case "cloud.region":
			set(&b.Region, value)
		case "cloud.availability_zone":
			set(&b.Zone, value)
		}
	}
}

// plain reports whether a value consists of what W3C Baggage, section 3.3.1.3,
// lets stand as it is. Percent-encoded ones are not decoded: names have none.
func plain(s string) bool {
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c <= ' ', c >= 0x7f, c == '"', c == ',', c == ';', c == '\\':
			return false
		}
	}
	return true
}
