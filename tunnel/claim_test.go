// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/culvert-mesh/culvert/tunnel/hbone"
)

func TestClaim(t *testing.T) {
	const id = "spiffe://mesh.example/ns/demo/sa/web"
	for name, tt := range map[string]struct {
		id      string
		baggage hbone.Baggage
		want    string
	}{
		"a pod":              {id, hbone.Baggage{Namespace: "demo", Pod: "a"}, "demo/a"},
		"a deployment":       {id, hbone.Baggage{Namespace: "demo", Pod: "a", Workload: "b", WorkloadKind: "deployment"}, "demo/b"},
		"nobody":             {id, hbone.Baggage{Namespace: "demo"}, "/"},
		"nowhere":            {id, hbone.Baggage{Pod: "a"}, "/"},
		"another namespace":  {id, hbone.Baggage{Namespace: "prod", Pod: "a"}, "/"},
		"part of it":         {id, hbone.Baggage{Namespace: "dem", Pod: "a"}, "/"},
		"more than it":       {id, hbone.Baggage{Namespace: "demo/sa", Pod: "a"}, "/"},
		"no namespace in it": {"spiffe://mesh.example/demo/web", hbone.Baggage{Namespace: "demo", Pod: "a"}, "/"},
		"the longest":        {id, hbone.Baggage{Namespace: "demo", Pod: strings.Repeat("a", maxName)}, "demo/" + strings.Repeat("a", maxName)},
		"longer":             {id, hbone.Baggage{Namespace: "demo", Pod: strings.Repeat("a", maxName+1)}, "/"},
	} {
		workload, namespace := claim(tt.baggage, spiffeid.RequireFromString(tt.id))
		if got := namespace + "/" + workload; got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}
