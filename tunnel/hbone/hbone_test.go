// SPDX-License-Identifier: Apache-2.0

package hbone

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/net/http2/hpack"
)

var sameAddr = cmpopts.EquateComparable(netip.AddrPort{})

func fields(pairs ...string) []hpack.HeaderField {
	var f []hpack.HeaderField
	for i := 0; i < len(pairs); i += 2 {
		f = append(f, hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return f
}

func TestRequestOnTheWire(t *testing.T) {
	for name, tt := range map[string]struct {
		req  Request
		want []hpack.HeaderField
	}{
		"least": {
			Request{Authority: netip.MustParseAddrPort("10.0.0.1:80")},
			fields(":method", "CONNECT", ":authority", "10.0.0.1:80"),
		},
		"all": {
			Request{
				Authority: netip.MustParseAddrPort("[fd77::1]:8080"),
				Baggage: Baggage{
					Cluster: "Kubernetes", Namespace: "default", Workload: "curl", WorkloadKind: "deployment",
					Service: "curl", Version: "latest", Region: "eu", Zone: "eu-1",
				},
				Forwarded:   netip.MustParseAddrPort("[fd77::2]:41000"),
				Traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
			},
			fields(":method", "CONNECT", ":authority", "[fd77::1]:8080",
				"baggage", "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=curl,"+
					"service.name=curl,service.version=latest,cloud.region=eu,cloud.availability_zone=eu-1",
				"forwarded", `for="[fd77::2]:41000"`,
				"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
		},
		"pod": {
			Request{Authority: netip.MustParseAddrPort("10.0.0.1:80"), Baggage: Baggage{Namespace: "shop", Pod: "cart-0"}},
			fields(":method", "CONNECT", ":authority", "10.0.0.1:80", "baggage", "k8s.namespace.name=shop,k8s.pod.name=cart-0"),
		},
		"a value that must be escaped": {
			Request{Authority: netip.MustParseAddrPort("10.0.0.1:80"), Baggage: Baggage{Pod: "a,b=c%\r\n\"é"}},
			fields(":method", "CONNECT", ":authority", "10.0.0.1:80", "baggage", "k8s.pod.name=a%2Cb%3Dc%25%0D%0A%22%C3%A9"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := tt.req.AppendFields(nil)
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Fatalf("fields (-want +got):\n%s", d)
			}
			back, refusal := ParseRequest(got)
			if refusal != nil {
				t.Fatal(refusal)
			}
			if strings.ContainsAny(tt.req.Baggage.Pod, "\r\n") {
				tt.req.Baggage.Pod = "" // not kept: it goes into logs
			}
			if d := cmp.Diff(tt.req, back, sameAddr); d != "" {
				t.Errorf("read again (-want +got):\n%s", d)
			}
		})
	}
}

func TestParseRequestRefuses(t *testing.T) {
	for name, f := range map[string][]hpack.HeaderField{
		"nothing":           nil,
		"no method":         fields(":authority", "10.0.0.1:80"),
		"GET":               fields(":method", "GET", ":authority", "10.0.0.1:80"),
		"connect":           fields(":method", "connect", ":authority", "10.0.0.1:80"),
		"two methods":       fields(":method", "CONNECT", ":method", "CONNECT", ":authority", "10.0.0.1:80"),
		"two authorities":   fields(":method", "CONNECT", ":authority", "10.0.0.1:80", ":authority", "10.0.0.1:80"),
		"scheme":            fields(":method", "CONNECT", ":authority", "10.0.0.1:80", ":scheme", "http"),
		"path":              fields(":method", "CONNECT", ":authority", "10.0.0.1:80", ":path", "/"),
		"extended":          fields(":method", "CONNECT", ":authority", "10.0.0.1:80", ":protocol", "websocket"),
		"no authority":      fields(":method", "CONNECT"),
		"host instead":      fields(":method", "CONNECT", "host", "10.0.0.1:80"),
		"empty authority":   fields(":method", "CONNECT", ":authority", ""),
		"name":              fields(":method", "CONNECT", ":authority", "localhost:80"),
		"no port":           fields(":method", "CONNECT", ":authority", "10.0.0.1"),
		"port empty":        fields(":method", "CONNECT", ":authority", "10.0.0.1:"),
		"port 0":            fields(":method", "CONNECT", ":authority", "10.0.0.1:0"),
		"port 65536":        fields(":method", "CONNECT", ":authority", "10.0.0.1:65536"),
		"port +80":          fields(":method", "CONNECT", ":authority", "10.0.0.1:+80"),
		"port 080":          fields(":method", "CONNECT", ":authority", "10.0.0.1:080"),
		"port by name":      fields(":method", "CONNECT", ":authority", "10.0.0.1:http"),
		"v6 bare":           fields(":method", "CONNECT", ":authority", "fd77::1:80"),
		"v6 with zone":      fields(":method", "CONNECT", ":authority", "[fe80::1%eth0]:80"),
		"v4 in brackets":    fields(":method", "CONNECT", ":authority", "[10.0.0.1]:80"),
		"v4-mapped":         fields(":method", "CONNECT", ":authority", "[::ffff:10.0.0.1]:80"),
		"v4 with zeros":     fields(":method", "CONNECT", ":authority", "010.0.0.1:80"),
		"user":              fields(":method", "CONNECT", ":authority", "me@10.0.0.1:80"),
		"space in front":    fields(":method", "CONNECT", ":authority", " 10.0.0.1:80"),
		"slash behind":      fields(":method", "CONNECT", ":authority", "10.0.0.1:80/"),
		"long":              fields(":method", "CONNECT", ":authority", strings.Repeat("1", 1<<14)+":80"),
		"control character": fields(":method", "CONNECT", ":authority", "10.0.0.1:80\n"),
	} {
		t.Run(name, func(t *testing.T) {
			req, refusal := ParseRequest(f)
			if refusal == nil {
				t.Fatalf("taken as %+v", req)
			}
			if refusal.Status != 400 {
				t.Errorf("status %d, want 400", refusal.Status)
			}
			if len(refusal.Detail) > 400 || strings.ContainsAny(refusal.Detail, "\r\n") {
				t.Errorf("detail is not fit for a log: %q", refusal.Detail)
			}
		})
	}
}

func TestForwarded(t *testing.T) {
	for value, want := range map[string]string{
		`for="10.0.0.1:5000"`:                "10.0.0.1:5000",
		`for="[fd77::1]:5000"`:               "[fd77::1]:5000",
		`for=10.0.0.1`:                       "10.0.0.1:0",
		`for="[fd77::1]"`:                    "[fd77::1]:0",
		`For="10.0.0.1:1";proto=http`:        "10.0.0.1:1",
		`by=unknown; for="10.0.0.1:1"`:       "10.0.0.1:1",
		`for="10.0.0.1:1", for="10.0.0.2:2"`: "10.0.0.1:1",
		`for="[::ffff:10.0.0.1]:7"`:          "10.0.0.1:7",
		`for=unknown`:                        "",
		`for=_hidden`:                        "",
		`for="[fe80::1%eth0]:1"`:             "",
		`10.0.0.1`:                           "",
		`for`:                                "",
		`for="`:                              "",
		`for=""`:                             "",
		``:                                   "",
		`;;;,,,===`:                          "",
		`for="10.0.0.1:1";` + strings.Repeat("a=b;", maxForwarded/4): "",
	} {
		got := parseForwarded(value)
		if want == "" && got.IsValid() || want != "" && got.String() != want {
			t.Errorf("%.60s: got %v, want %q", value, got, want)
		}
	}
}

func TestBaggage(t *testing.T) {
	for name, tt := range map[string]struct {
		values []string
		want   Baggage
	}{
		"of Istio": {
			[]string{"k8s.cluster.name=K1,k8s.namespace.name=NS1,k8s.deployment.name=N1,service.name=N2,service.version=V1"},
			Baggage{Cluster: "K1", Namespace: "NS1", Workload: "N1", WorkloadKind: "deployment", Service: "N2", Version: "V1"},
		},
		"in several fields": {
			[]string{"k8s.cluster.name=K1", "k8s.job.name=N1", "service.name=N2"},
			Baggage{Cluster: "K1", Workload: "N1", WorkloadKind: "job", Service: "N2"},
		},
		"spaces and properties": {[]string{" k8s.pod.name = p1 ; a=b , service.name=s\t"}, Baggage{Pod: "p1", Service: "s"}},
		"empty values":          {[]string{"k8s.cluster.name=,service.name="}, Baggage{}},
		"unknown":               {[]string{"a=b,=c,d,,,k8s.daemonset.name=x"}, Baggage{}},
		"escaped":               {[]string{"service.name=a%2Cb"}, Baggage{Service: "a,b"}},
		"a control character":   {[]string{"service.name=a%0Ab,k8s.pod.name=p"}, Baggage{Pod: "p"}},
		"as long as allowed":    {[]string{"k8s.pod.name=p", "x=" + strings.Repeat("y", maxBaggage-len("k8s.pod.name=p")-2-14), "service.name=s"}, Baggage{Pod: "p", Service: "s"}},
		"one byte more":         {[]string{"k8s.pod.name=p", "x=" + strings.Repeat("y", maxBaggage-len("k8s.pod.name=p")-2-13), "service.name=s"}, Baggage{Pod: "p"}},
	} {
		t.Run(name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, ParseBaggage(tt.values)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

func TestTraceparentBound(t *testing.T) {
	for n, kept := range map[int]bool{maxTraceparent: true, maxTraceparent + 1: false} {
		req, refusal := ParseRequest(fields(":method", "CONNECT", ":authority", "10.0.0.1:80", "traceparent", strings.Repeat("0", n)))
		if refusal != nil {
			t.Fatal(refusal)
		}
		if (req.Traceparent != "") != kept {
			t.Errorf("%d bytes: kept %d", n, len(req.Traceparent))
		}
	}
}

func TestResponse(t *testing.T) {
	for name, tt := range map[string]struct {
		fields []hpack.HeaderField
		status int
		reason string
		bad    bool
	}{
		"ours":              {fields: ResponseFields(200, ""), status: 200},
		"our refusal":       {fields: ResponseFields(503, "no_endpoint"), status: 503, reason: "no_endpoint"},
		"with other fields": {fields: fields(":status", "401", "server", "x", "date", "y"), status: 401},
		"no plain word":     {fields: fields(":status", "503", fieldReason, "a b"), status: 503},
		"capitals":          {fields: fields(":status", "503", fieldReason, "Denied"), status: 503},
		"longest":           {fields: fields(":status", "503", fieldReason, strings.Repeat("a", maxReason)), status: 503, reason: strings.Repeat("a", maxReason)},
		"too long":          {fields: fields(":status", "503", fieldReason, strings.Repeat("a", maxReason+1)), status: 503},
		"no status":         {fields: fields("server", "x"), bad: true},
		"empty":             {fields: fields(":status", ""), bad: true},
		"two digits":        {fields: fields(":status", "20"), bad: true},
		"four digits":       {fields: fields(":status", "2000"), bad: true},
		"signed":            {fields: fields(":status", "+20"), bad: true},
		"zeros":             {fields: fields(":status", "020"), bad: true},
	} {
		t.Run(name, func(t *testing.T) {
			status, reason, err := ParseResponse(tt.fields)
			if (err != nil) != tt.bad || status != tt.status || reason != tt.reason {
				t.Errorf("got %d, %q, %v; want %d, %q, error %v", status, reason, err, tt.status, tt.reason, tt.bad)
			}
		})
	}
}

// FuzzParseRequest: what is taken can be written, and read again as the same.
func FuzzParseRequest(f *testing.F) {
	f.Add("CONNECT", "10.0.0.1:80", "k8s.pod.name=p,service.name=s", `for="10.0.0.2:5000"`, "00-1-2-01")
	f.Add("CONNECT", "[fd77::1]:15008", "a=b;c=d,k8s.job.name=%41", "for=10.0.0.1, for=unknown", "")
	f.Add("GET", "localhost", "%", `for="[::1%lo]"`, "\x00")
	f.Fuzz(func(t *testing.T, method, authority, baggage, forwarded, traceparent string) {
		req, refusal := ParseRequest(fields(":method", method, ":authority", authority,
			"baggage", baggage, "forwarded", forwarded, "traceparent", traceparent))
		if refusal != nil {
			if refusal.Status != 400 || refusal.Detail == "" {
				t.Fatalf("refused with %+v", refusal)
			}
			return
		}
		if a, err := netip.ParseAddrPort(authority); err != nil || a != req.Authority || a.Port() == 0 {
			t.Fatalf("authority %q taken as %v", authority, req.Authority)
		}
		again, refusal := ParseRequest(req.AppendFields(nil))
		if refusal != nil {
			t.Fatalf("%+v is refused: %v", req, refusal)
		}
		if d := cmp.Diff(req, again, sameAddr); d != "" {
			t.Fatalf("read again (-first +second):\n%s", d)
		}
	})
}

// FuzzParseResponse: what is taken can be written, and read again as the same.
func FuzzParseResponse(f *testing.F) {
	f.Add("200", "")
	f.Add("503", "refused")
	f.Add("000", "\x00")
	f.Fuzz(func(t *testing.T, status, reason string) {
		n, r, err := ParseResponse(fields(":status", status, fieldReason, reason))
		if err != nil {
			return
		}
		n2, r2, err := ParseResponse(ResponseFields(n, r))
		if err != nil || n2 != n || r2 != r || n < 100 || n > 999 {
			t.Fatalf("%q, %q: %d, %q; again %d, %q, %v", status, reason, n, r, n2, r2, err)
		}
	})
}
