// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"github.com/culvert-mesh/culvert/config/strict"
)

// ParseFile reads data as the file at path:
//
//	rules:
//	  - name: no-batch
//	    denySource: [spiffe://cluster.local/ns/demo/sa/batch]
//
// A mistake is a *strict.Error.
func ParseFile(path string, data []byte) ([]Rule, error) {
	var rules []Rule
	lines := map[string]int{}
	err := strict.Read(path, data, func(o *strict.Object) {
		o.Objects("rules", func(o *strict.Object) {
			var r Rule
			o.RequireName("name", &r.Name)
			if line, twice := lines[r.Name]; twice {
				o.Fail("name", "each name once", "%q is also that of line %d", r.Name, line)
			}
			if r.Name == RuleDefaultAllow || r.Name == RuleNone {
				o.Fail("name", "any other name", "%q is built in", r.Name)
			}
			lines[r.Name] = o.Line("name")
			o.RequireList("denySource", "one SPIFFE ID or more")
			o.IDs("denySource", &r.DenySource)
			rules = append(rules, r)
		})
	})
	if err != nil {
		return nil, err
	}
	return rules, nil
}
