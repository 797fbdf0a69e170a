// SPDX-License-Identifier: Apache-2.0

package hbone

import (
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/net/http2/hpack"
)

var equal = cmp.Options{cmpopts.EquateComparable(netip.AddrPort{})}

func fields(pairs ...string) []hpack.HeaderField {
	var f []hpack.HeaderField
	for i := 0; i < len(pairs); i += 2 {
		f = append(f, hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return f
}

func trace(s string) Trace {
	t, ok := parseTrace(s)
	if !ok {
		panic(s)
	}
	return t
}

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// What goes over the wire is what Istio's ambient mode sends.
func TestFields(t *testing.T) {
	tests := []struct {
		name string
		r    Request
		want []hpack.HeaderField
	}{
		{"least", Request{Authority: addr("10.0.0.1:80")}, fields(":method", "CONNECT", ":authority", "10.0.0.1:80")},
		{"v6", Request{Authority: addr("[fd00::1]:80"), Forwarded: addr("[fd00::2]:1234")}, fields(
			":method", "CONNECT", ":authority", "[fd00::1]:80", "forwarded", `for="[fd00::2]:1234"`)},
		{"all", Request{
			Authority: addr("10.0.0.1:80"),
			Baggage: Baggage{
				Cluster: "c", Namespace: "ns", Workload: "w", WorkloadKind: "deployment", Service: "s", Version: "v1", Region: "r", Zone: "z",
			},
			Forwarded: addr("10.0.0.2:1234"),
			Trace:     trace("00-11111111111111111111111111111111-2222222222222222-00"),
		}, fields(
			":method", "CONNECT", ":authority", "10.0.0.1:80",
			"baggage", "k8s.cluster.name=c,k8s.namespace.name=ns,k8s.deployment.name=w,service.name=s,service.version=v1,cloud.region=r,cloud.availability_zone=z",
			"forwarded", `for="10.0.0.2:1234"`,
			"traceparent", "00-11111111111111111111111111111111-2222222222222222-00")},
		{"pod", Request{Authority: addr("10.0.0.1:80"), Baggage: Baggage{Namespace: "ns", Pod: "p"}}, fields(
			":method", "CONNECT", ":authority", "10.0.0.1:80", "baggage", "k8s.namespace.name=ns,k8s.pod.name=p")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.r.Fields()
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Fatal(d)
			}
			back, refusal := ParseRequest(got)
			if refusal != nil {
				t.Fatal(refusal)
			}
			if d := cmp.Diff(tt.r, back, equal); d != "" {
				t.Fatal(d)
			}
		})
	}
}

func TestAuthority(t *testing.T) {
	for s, ok := range map[string]bool{
		"10.0.0.1:80":                 true,
		"[fd00::1]:80":                true,
		"[::]:65535":                  true,
		"0.0.0.0:1":                   true,
		"":                            false,
		"10.0.0.1":                    false,
		"10.0.0.1:":                   false,
		"10.0.0.1:0":                  false,
		"10.0.0.1:080":                false,
		"10.0.0.1:+80":                false,
		"10.0.0.1:65536":              false,
		"10.0.0.1:80 ":                false,
		" 10.0.0.1:80":                false,
		"010.0.0.1:80":                false,
		"10.0.0:80":                   false,
		"10.0.0.1:80:80":              false,
		"10.0.0.1:80/":                false,
		"user@10.0.0.1:80":            false,
		"fd00::1:80":                  false,
		"[fd00::1]":                   false,
		"[fd00::1%eth0]:80":           false,
		"[::ffff:10.0.0.1]:80":        false, // 10.0.0.1 to some
		"[10.0.0.1]:80":               false,
		"svc.ns.svc.cluster.local:80": false,
		"localhost:80":                false,
		"[fd00::1]:" + strings.Repeat("0", 100) + "80": false,
	} {
		r, refusal := ParseRequest(fields(":method", "CONNECT", ":authority", s))
		if (refusal == nil) != ok {
			t.Errorf("%q: %v, %v", s, r.Authority, refusal)
		}
		if refusal != nil && refusal.Status != 400 {
			t.Errorf("%q: status %d", s, refusal.Status)
		}
		if ok && r.Authority.String() != s {
			t.Errorf("%q becomes %v", s, r.Authority)
		}
	}
}

func TestRefusals(t *testing.T) {
	for name, f := range map[string][]hpack.HeaderField{
		"nothing":          nil,
		"GET":              fields(":method", "GET", ":authority", "10.0.0.1:80"),
		"lower case":       fields(":method", "connect", ":authority", "10.0.0.1:80"),
		"no method":        fields(":authority", "10.0.0.1:80"),
		"no authority":     fields(":method", "CONNECT"),
		"host instead":     fields(":method", "CONNECT", "host", "10.0.0.1:80"),
		"path":             fields(":method", "CONNECT", ":authority", "10.0.0.1:80", ":path", "/"),
		"scheme":           fields(":method", "CONNECT", ":authority", "10.0.0.1:80", ":scheme", "https"),
		"extended CONNECT": fields(":method", "CONNECT", ":authority", "10.0.0.1:80", ":protocol", "websocket"),
		"two methods":      fields(":method", "CONNECT", ":method", "CONNECT", ":authority", "10.0.0.1:80"),
		"two authorities":  fields(":method", "CONNECT", ":authority", "10.0.0.1:80", ":authority", "10.0.0.2:80"),
	} {
		if _, refusal := ParseRequest(f); refusal == nil || refusal.Status != 400 || refusal.Detail == "" {
			t.Errorf("%s: %v", name, refusal)
		}
	}
	// What an error says of a peer's bytes is fit for a log.
	_, refusal := ParseRequest(fields(":method", "CONNECT", ":authority", strings.Repeat("\x00\n", 10000)))
	if len(refusal.Error()) > 400 || strings.ContainsAny(refusal.Error(), "\x00\n") {
		t.Errorf("refusal %q", refusal.Error())
	}
}

// A value goes out in a form that splits no header and no list.
func TestBaggageIsEscaped(t *testing.T) {
	got := Baggage{Pod: "a,b=c%\r\n\"é;"}.String()
	if want := "k8s.pod.name=a%2Cb%3Dc%25%0D%0A%22%C3%A9%3B"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := (Baggage{Workload: "w", WorkloadKind: "x,y"}).String(); got != "" {
		t.Errorf("unknown kind: %s", got)
	}
}

func TestForwarded(t *testing.T) {
	for s, want := range map[string]netip.AddrPort{
		`for="10.0.0.1:80"`:                    addr("10.0.0.1:80"),
		`for="[fd00::1]:80"`:                   addr("[fd00::1]:80"),
		`for="10.0.0.1:80";host=svc.ns`:        addr("10.0.0.1:80"), // Istio, to a service
		`host=svc; For=10.0.0.1:80 ;proto=tcp`: addr("10.0.0.1:80"),
		`for=10.0.0.1`:                         addr("10.0.0.1:0"), // older Istio
		`for="[fd00::1]"`:                      addr("[fd00::1]:0"),
		`for="[::ffff:10.0.0.1]:80"`:           addr("10.0.0.1:80"),
		`for="10.0.0.1:80", for="10.0.0.2:80"`: addr("10.0.0.1:80"),
		`by=10.0.0.9`:                          {},
		`for=unknown`:                          {},
		`for=_hidden`:                          {},
		`for="[fe80::1%eth0]:80"`:              {},
		`for=`:                                 {},
		`for="`:                                {},
		``:                                     {},
		`;;;,`:                                 {},
		"for=10.0.0.1;" + strings.Repeat("x", maxForwarded-len("for=10.0.0.1;")):   addr("10.0.0.1:0"),
		"for=10.0.0.1;" + strings.Repeat("x", maxForwarded-len("for=10.0.0.1;")+1): {},
	} {
		r, refusal := ParseRequest(fields(":method", "CONNECT", ":authority", "10.0.0.9:80", "forwarded", s))
		if refusal != nil || r.Forwarded != want {
			t.Errorf("%q: %v (%v), want %v", s, r.Forwarded, refusal, want)
		}
	}
	r, _ := ParseRequest(fields(":method", "CONNECT", ":authority", "10.0.0.9:80", "forwarded", "for=a", "forwarded", "for=10.0.0.1", "forwarded", "for=10.0.0.2"))
	if r.Forwarded != addr("10.0.0.1:0") {
		t.Errorf("of several: %v", r.Forwarded)
	}
}

func TestParseBaggage(t *testing.T) {
	all := Baggage{Cluster: "K1", Namespace: "NS1", Workload: "N1", WorkloadKind: "deployment", Service: "N2", Version: "V1"}
	for name, tt := range map[string]struct {
		in   []string
		want Baggage
	}{
		"Istio's":       {[]string{"k8s.cluster.name=K1,k8s.namespace.name=NS1,k8s.deployment.name=N1,service.name=N2,service.version=V1"}, all},
		"in fields":     {[]string{"k8s.cluster.name=K1", "k8s.namespace.name=NS1", "k8s.deployment.name=N1", "service.name=N2", "service.version=V1"}, all},
		"empty values":  {[]string{"k8s.cluster.name=,k8s.namespace.name=,service.name="}, Baggage{}},
		"none":          {nil, Baggage{}},
		"kinds":         {[]string{"k8s.cronjob.name=c,k8s.pod.name=p"}, Baggage{Workload: "c", WorkloadKind: "cronjob", Pod: "p"}},
		"places":        {[]string{"cloud.region=r,cloud.availability_zone=z"}, Baggage{Region: "r", Zone: "z"}},
		"spaces":        {[]string{" service.name = a ;prop=1 , service.version=b"}, Baggage{Service: "a", Version: "b"}},
		"encoded":       {[]string{"service.name=a%2Cb%3Dc"}, Baggage{Service: "a,b=c"}},
		"badly encoded": {[]string{"service.name=a%2"}, Baggage{Service: "a%2"}},
		"control":       {[]string{"service.name=a%0Ab,service.version=v"}, Baggage{Version: "v"}},
		"unknown":       {[]string{"x=y,k8s.foo.name=z,=q,,;,k8s..name=e,k8s.name=f"}, Baggage{}},
		"last one":      {[]string{"service.name=a,service.name=b"}, Baggage{Service: "b"}},
		"at the bound":  {[]string{"service.name=" + strings.Repeat("a", maxBaggage-len("service.name="))}, Baggage{Service: strings.Repeat("a", maxBaggage-len("service.name="))}},
		"above it":      {[]string{"service.name=" + strings.Repeat("a", maxBaggage-len("service.name=")+1)}, Baggage{}},
		"above in two":  {[]string{"service.name=a", strings.Repeat("b", maxBaggage)}, Baggage{Service: "a"}},
	} {
		if d := cmp.Diff(tt.want, parseBaggage(tt.in)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestTrace(t *testing.T) {
	const id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	const good = "00-" + id + "-" + parent + "-01"
	const later = "cc-" + id + "-" + parent + "-01-"
	for in, want := range map[string]string{
		good:                              good,
		"00-" + id + "-" + parent + "-ff": "00-" + id + "-" + parent + "-ff",
		// Of a later version, what is known of it.
		"cc-" + id + "-" + parent + "-01":      good,
		"cc-" + id + "-" + parent + "-01-what": good,
		"cc-" + id + "-" + parent + "-01-":     good,
		"cc-" + id + "-" + parent + "-01.":     "",
		"ff-" + id + "-" + parent + "-01":      "",
		good + "-":                             "",
		good + "0":                             "",
		good[:len(good)-1]:                     "",
		"":                                     "",
		"00-" + strings.ToUpper(id) + "-" + parent + "-01":       "",
		"00-" + strings.Repeat("0", 32) + "-" + parent + "-01":   "",
		"00-" + id + "-" + strings.Repeat("0", 16) + "-01":       "",
		"00-" + id + "_" + parent + "-01":                        "",
		"00-" + id + "-" + parent + "_01":                        "",
		"00_" + id + "-" + parent + "-01":                        "",
		"0g-" + id + "-" + parent + "-01":                        "",
		"00-" + id + "-" + parent + "-0g":                        "",
		"00-" + id[1:] + "g-" + parent + "-01":                   "",
		"00-" + id + "-" + parent[1:] + "\n-01":                  "",
		strings.Repeat("0", len(good)):                           "",
		later + strings.Repeat("x", maxTraceparent-len(later)):   good,
		later + strings.Repeat("x", maxTraceparent-len(later)+1): "",
	} {
		r, refusal := ParseRequest(fields(":method", "CONNECT", ":authority", "10.0.0.1:80", "traceparent", in))
		got := ""
		if !r.Trace.IsZero() {
			got = r.Trace.String()
		}
		if refusal != nil || got != want {
			t.Errorf("%q: %q, %v, want %q", in, got, refusal, want)
		}
	}
	other := strings.Replace(good, "0a", "0b", 1)
	r, _ := ParseRequest(fields(":method", "CONNECT", ":authority", "10.0.0.1:80", "traceparent", "x", "traceparent", good, "traceparent", other))
	if r.Trace.String() != good {
		t.Errorf("of several: %s", r.Trace)
	}
}

func TestResponses(t *testing.T) {
	for _, tt := range []struct {
		status int
		reason string
	}{{200, ""}, {400, "refused"}, {401, "denied"}, {503, "no_endpoint"}} {
		status, reason, err := ParseResponse(ResponseFields(tt.status, tt.reason))
		if status != tt.status || reason != tt.reason || err != nil {
			t.Errorf("%v: %d %q %v", tt, status, reason, err)
		}
	}
	for name, tt := range map[string]struct {
		in     []hpack.HeaderField
		status int
		reason string
		bad    bool
	}{
		"nothing":         {nil, 0, "", true},
		"two digits":      {fields(":status", "20"), 0, "", true},
		"four digits":     {fields(":status", "2000"), 0, "", true},
		"sign":            {fields(":status", "+20"), 0, "", true},
		"leading zero":    {fields(":status", "020"), 0, "", true},
		"Istio's":         {fields(":status", "200", "baggage", "x=y"), 200, "", false},
		"reason in prose": {fields(":status", "503", "culvert-reason", "no way"), 503, "", false},
		"reason too long": {fields(":status", "503", "culvert-reason", strings.Repeat("a", maxReason+1)), 503, "", false},
		"reason at bound": {fields(":status", "503", "culvert-reason", strings.Repeat("a", maxReason)), 503, strings.Repeat("a", maxReason), false},
	} {
		status, reason, err := ParseResponse(tt.in)
		if status != tt.status || reason != tt.reason || (err != nil) != tt.bad {
			t.Errorf("%s: %d %q %v", name, status, reason, err)
		}
	}
}

// A request that is taken is the same when it is written again.
func FuzzParseRequest(f *testing.F) {
	f.Add("CONNECT", "10.0.0.1:80", "k8s.namespace.name=a,k8s.pod.name=b", `for="10.0.0.2:1"`, "00-11111111111111111111111111111111-2222222222222222-00", "x", "y")
	f.Add("CONNECT", "[fd00::1]:80", "service.name=a%2Cb;p=1", `for=10.0.0.2;host=h`, "", ":path", "/")
	f.Add("CONNECT", "[fd0:0::1]:80", "", "", "", "", "") // not the shortest way
	f.Add("GET", "host:80", "k8s.job.name=%zz", `for=_x`, "", "", "")
	f.Fuzz(func(t *testing.T, method, authority, baggage, forwarded, traceparent, name, value string) {
		r, refusal := ParseRequest(fields(":method", method, ":authority", authority, "baggage", baggage,
			"forwarded", forwarded, "traceparent", traceparent, name, value))
		if refusal != nil {
			if refusal.Status != 400 || len(refusal.Detail) > 400 {
				t.Fatal(refusal)
			}
			return
		}
		// As another parser reads it: an IPv6 address has several ways to be written.
		host, port, err := net.SplitHostPort(authority)
		if method != "CONNECT" || err != nil || !net.ParseIP(host).Equal(r.Authority.Addr().AsSlice()) || strconv.Itoa(int(r.Authority.Port())) != port || port == "0" || r.Authority.Addr().Zone() != "" {
			t.Fatalf("%q %q taken as %v", method, authority, r.Authority)
		}
		again, refusal := ParseRequest(r.Fields())
		if refusal != nil {
			t.Fatal(refusal)
		}
		if r.Baggage.Workload == "" {
			r.Baggage.WorkloadKind = "" // says nothing
		}
		if len(r.Baggage.String()) > maxBaggage {
			again.Baggage = r.Baggage // encoding made it too long
		}
		if d := cmp.Diff(r, again, equal); d != "" {
			t.Fatalf("written again (-first +second):\n%s", d)
		}
	})
}

func FuzzParseResponse(f *testing.F) {
	f.Add(":status", "200", "culvert-reason", "refused")
	f.Add("culvert-reason", "no", ":status", "099")
	f.Fuzz(func(t *testing.T, n1, v1, n2, v2 string) {
		status, reason, err := ParseResponse(fields(n1, v1, n2, v2))
		if err != nil {
			if status != 0 || reason != "" || len(err.Error()) > 400 {
				t.Fatal(status, reason, err)
			}
			return
		}
		if status < 100 || status > 999 || reason != "" && !word(reason) {
			t.Fatal(status, reason)
		}
	})
}
