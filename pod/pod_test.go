// SPDX-License-Identifier: Apache-2.0

package pod

import "testing"

func TestKeyAndIdentity(t *testing.T) {
	p := Pod{Name: "web-1", Namespace: "demo", ServiceAccount: "web", TrustDomain: "cluster.local"}
	if got := p.Key(); got != "demo_web-1" {
		t.Errorf("key %s", got)
	}
	if got := p.Identity().String(); got != "spiffe://cluster.local/ns/demo/sa/web" {
		t.Errorf("identity %s", got)
	}
	successor := p
	p.UID, successor.UID = "1", "2"
	if p.Key() == successor.Key() {
		t.Error("a pod and its successor have one key")
	}
	p.ServiceAccount = ""
	if !p.Identity().IsZero() {
		t.Errorf("identity of nothing: %s", p.Identity())
	}
}
