// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"strconv"

	"github.com/culvert-mesh/culvert/config/strict"
)

// File is what a policy file holds.
type File struct {
	Rules []Rule
	Modes []ModeRule
}

// ParseFile reads data as the file at path:
//
//	rules:
//	  - name: no-batch
//	    denySource: [spiffe://cluster.local/ns/demo/sa/batch]
//	modes:
//	  - name: legacy
//	    namespace: demo
//	    workload: web
//	    mode: permissive
//	    ports: {8080: strict}
//
// A mistake is a *strict.Error.
func ParseFile(path string, data []byte) (File, error) {
	var f File
	names := map[string]int{} // lines
	name := func(o *strict.Object, dst *string) {
		o.RequireName("name", dst)
		if line, twice := names[*dst]; twice && *dst != "" {
			o.Fail("name", "each name once", "%q is also that of line %d", *dst, line)
			return
		}
		if *dst == RuleDefaultAllow || *dst == RuleNone || *dst == RuleDefaultMode {
			o.Fail("name", "any other name", "%q is built in", *dst)
		}
		names[*dst] = o.Line("name")
	}
	scopes := map[scope]int{} // lines
	err := strict.Read(path, data, func(o *strict.Object) {
		o.Objects("rules", func(o *strict.Object) {
			var r Rule
			name(o, &r.Name)
			o.RequireList("denySource", "one SPIFFE ID or more")
			o.IDs("denySource", &r.DenySource)
			f.Rules = append(f.Rules, r)
		})
		o.Objects("modes", func(o *strict.Object) {
			var r ModeRule
			name(o, &r.Name)
			readMode(o, &r)
			if line, twice := scopes[r.scope()]; twice {
				o.Fail(narrowest(r), "one mode for each workload, for each namespace, and for the mesh", "it is for the same as the one of line %d; join the two", line)
				return
			}
			scopes[r.scope()] = o.Line("name")
			f.Modes = append(f.Modes, r)
		})
	})
	if err != nil {
		return File{}, err
	}
	return f, nil
}

func readMode(o *strict.Object, r *ModeRule) {
	o.Name("namespace", &r.Namespace)
	o.Name("workload", &r.Workload)
	if o.Has("workload") && !o.Has("namespace") {
		o.Fail("workload", "the namespace of the workload beside it", "has no namespace")
	}
	strict.Enum(o, "mode", &r.Mode, Strict, Permissive)
	strict.Map(o, "ports", &r.Ports, "a port from 1 to 65535", parsePort, "strict, permissive", parseMode)
	if o.Has("ports") && !o.Has("workload") {
		o.Fail("ports", "ports beside a workload; a namespace and the mesh have one mode for all", "has no workload")
	}
	if !o.Has("mode") && !o.Has("ports") {
		o.Fail("mode", "mode, ports or both", "is missing")
	}
}

// narrowest is the key that says whom a mode is for.
func narrowest(r ModeRule) string {
	switch {
	case r.Workload != "":
		return "workload"
	case r.Namespace != "":
		return "namespace"
	}
	return "name"
}

func parsePort(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != text {
		return 0, fmt.Errorf("%q is not valid", text)
	}
	return uint16(n), nil
}

func parseMode(text string) (Mode, error) {
	if m := Mode(text); m == Strict || m == Permissive {
		return m, nil
	}
	return "", fmt.Errorf("%q is not known", text)
}
